"""What counts as a difference between an object and what is wanted of it."""

from __future__ import annotations

from typing import Any

import pytest

from mmcore.controller.objects import covers


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"a": 1, "more": 2}, {"a": 1}),
        ({}, {"text": "", "flag": False, "list": [], "map": {}, "none": None}),
        ({"limits": {"memory": "1Gi", "cpu": "2"}}, {"limits": {"memory": "1024Mi", "cpu": 2}}),
        ({"emptyDir": {"sizeLimit": "3Gi"}}, {"emptyDir": {"sizeLimit": "3072Mi"}}),
        ({"requests": {"cpu": "500m"}}, {"requests": {"cpu": "0.5"}}),
        ({"env": [{"name": "B", "value": "2"}, {"name": "A"}]}, {"env": [{"name": "A", "value": ""}]}),
        ({"args": ["a"]}, {"args": ["a"]}),
    ],
)
def test_what_a_server_writes_differently_is_no_difference(found: Any, wanted: Any) -> None:
    assert covers(found, wanted)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"replicas": 1}, {"replicas": 0}),
        ({}, {"replicas": 1}),
        ({"a": 1}, {"a": None}),
        ({"limits": {"memory": "1Gi"}}, {"limits": {"memory": "1G"}}),
        ({"value": "1"}, {"value": "1000m"}),
        ({"limits": {"memory": "much"}}, {"limits": {"memory": "1Gi"}}),
        ({"env": [{"name": "A", "value": "1"}]}, {"env": [{"name": "A", "value": ""}]}),
        ({"env": [{"name": "A"}]}, {"env": [{"name": "A"}, {"name": "B"}]}),
        ({"args": ["a", "b"]}, {"args": ["a"]}),
        (None, {"a": 1}),
    ],
)
def test_differences(found: Any, wanted: Any) -> None:
    assert not covers(found, wanted)
