"""The file of tokens: what it grants, and what is said of one that is wrong."""

from __future__ import annotations

import hashlib

import pytest

from mmcore.server.tokens import Grant, digest_of, parse_tokens

SECRET = "s3cr3t-of-team-a"


def test_a_token_is_known_by_its_digest_however_it_is_written() -> None:
    plain = parse_tokens(f'[{{"name": "a", "token": "{SECRET}", "scopes": ["infer"]}}]')
    digest = parse_tokens(f"- {{name: a, sha256: {hashlib.sha256(SECRET.encode()).hexdigest()}, scopes: [infer]}}")
    assert plain == digest == {digest_of(SECRET): Grant("a", frozenset({"infer"}))}


def test_limits_and_models_are_read() -> None:
    text = (
        f"- {{name: a, token: {SECRET}, scopes: [infer, manage], models: ['x-*'], requests_per_s: 0.5, concurrent: 2}}"
    )
    [grant] = parse_tokens(text).values()
    assert grant == Grant("a", frozenset({"infer", "manage"}), ("x-*",), 0.5, 2)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: a, scopes: [infer]}", "either token or sha256"),
        ("{name: a, token: TOKEN, sha256: ab, scopes: [infer]}", "either token or sha256"),
        ("{name: a, sha256: TOKEN, scopes: [infer]}", "64 hexadecimal digits"),
        ("{name: a, token: 5, scopes: [infer]}", "put it in quotes"),
        ("{token: TOKEN, scopes: [infer]}", "entry 0: name"),
        ("{name: a, token: TOKEN}", "(a): scopes"),
        ("{name: a, token: TOKEN, scopes: [root]}", "infer and manage"),
        ("{name: a, token: TOKEN, scopes: [infer], models: []}", "models"),
        ("{name: a, token: TOKEN, scopes: [infer], requests_per_s: 0}", "requests_per_s"),
        ("{name: a, token: TOKEN, scopes: [infer], concurrent: 1.5}", "concurrent"),
        ("{name: a, token: TOKEN, scopes: [infer], concurrent: true}", "concurrent"),
        ("{name: a, token: TOKEN, scope: [infer]}", "expected fields among"),
        ("{name: a, token: TOKEN, scopes: [infer]}\n- {name: b, token: TOKEN, scopes: [infer]}", "the same as a's"),
        ("{name: a, token: 'TOKEN", "not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_and_no_token_told(entry: str, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_tokens("- " + entry.replace("TOKEN", SECRET))
    assert words in str(refused.value)
    assert SECRET not in str(refused.value)


def test_something_else_than_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="a list"):
        parse_tokens("name: a")
