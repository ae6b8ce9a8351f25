from __future__ import annotations

from mmcore.cli.top import Count, Use, used

MS = 1_000_000


def test_use_is_what_was_counted_between_two_looks() -> None:
    before = {("a", "1"): Count(10, 100 * MS, 10 * MS, 1), ("idle", "1"): Count(5, MS, 0, 0)}
    after = {
        ("a", "1"): Count(30, 300 * MS, 30 * MS, 3),
        ("idle", "1"): Count(5, MS, 0, 0),
        ("new", "2"): Count(100, 200 * MS, 0, 0),
    }
    assert used(before, after, 2.0) == [
        Use("new", "2", 50.0, 2.0, 0.0, 0.0),
        Use("a", "1", 10.0, 10.0, 1.0, 1.0),
    ]


def test_a_model_that_was_loaded_anew_begins_at_zero() -> None:
    assert used({("a", "1"): Count(10, MS, 0, 0)}, {("a", "1"): Count(4, 8 * MS, 0, 0)}, 1.0) == [
        Use("a", "1", 4.0, 2.0, 0.0, 0.0)
    ]


def test_a_model_that_only_fails_is_told() -> None:
    assert used({}, {("a", "1"): Count(0, 0, 0, 6)}, 2.0) == [Use("a", "1", 0.0, 0.0, 0.0, 3.0)]
