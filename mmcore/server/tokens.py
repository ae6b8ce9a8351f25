"""The file of ``--auth-tokens``: who may call, what for, and how much.

A YAML list (JSON will do)::

    - name: scoring            # what logs and errors call the caller
      sha256: 9f86d081…        # of the token, in hexadecimal; or token: the token itself
      scopes: [infer]          # infer, manage, or both
      models: ["fraud-*"]      # which models infer is for; all when absent
      requests_per_s: 500      # then RESOURCE_EXHAUSTED; no limit when absent
      concurrent: 64           # calls under way at once, likewise
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

INFER: Final = "infer"
MANAGE: Final = "manage"
_SCOPES: Final = (INFER, MANAGE)
_FIELDS: Final = ("name", "token", "sha256", "scopes", "models", "requests_per_s", "concurrent")


@dataclass(frozen=True, slots=True)
class Grant:
    """What the holder of one token may do.

    Attributes:
        models: patterns of names as a shell knows them; empty: every model.
        requests_per_s, concurrent: 0 for no limit.
    """

    name: str
    scopes: frozenset[str]
    models: tuple[str, ...] = ()
    requests_per_s: float = 0.0
    concurrent: int = 0


#: Grants by the SHA-256 of their token: what is compared tells nothing of the tokens, however long it takes.
Grants = Mapping[bytes, Grant]


def parse_tokens(text: str) -> Grants:
    """Read the file.

    Raises:
        ValueError: it is no such list; the text names entry and field, and never holds a token.
    """
    import yaml

    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError("not YAML") from None  # its own text quotes the file
    if not isinstance(entries, list):
        raise ValueError("expected a list of tokens")
    found: dict[bytes, Grant] = {}
    for number, entry in enumerate(entries):
        what = f"entry {number}"
        if not isinstance(entry, dict) or not set(entry) <= set(_FIELDS):
            raise ValueError(f"{what}: expected fields among {', '.join(_FIELDS)}")
        grant = _grant(entry, what)
        digest = _digest(entry, f"{what} ({grant.name})")
        if digest in found:
            raise ValueError(f"{what} ({grant.name}): the token is the same as {found[digest].name}'s")
        found[digest] = grant
    return found


def digest_of(token: str) -> bytes:
    """What a token is known by."""
    return hashlib.sha256(token.encode()).digest()


def _grant(entry: Mapping[str, Any], what: str) -> Grant:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what}: name: expected text")
    what = f"{what} ({name})"
    scopes, models = entry.get("scopes"), entry.get("models", [])
    if not _are_texts(scopes) or not scopes or not set(scopes) <= set(_SCOPES):
        raise ValueError(f"{what}: scopes: expected a list of {' and '.join(_SCOPES)}")
    if not _are_texts(models) or ("models" in entry and not models):
        raise ValueError(f"{what}: models: expected a list of patterns")
    rate, concurrent = entry.get("requests_per_s", 0), entry.get("concurrent", 0)
    for field, value, kinds in (("requests_per_s", rate, (int, float)), ("concurrent", concurrent, (int,))):
        if field in entry and (type(value) not in kinds or not 0 < value < float("inf")):
            raise ValueError(f"{what}: {field}: expected a number above 0")
    return Grant(name, frozenset(scopes), tuple(models), float(rate), concurrent)


def _digest(entry: Mapping[str, Any], what: str) -> bytes:
    token, digest = entry.get("token"), entry.get("sha256")
    if (token is None) == (digest is None):
        raise ValueError(f"{what}: expected either token or sha256")
    if digest is None:
        if not isinstance(token, str) or not token:
            raise ValueError(f"{what}: token: expected text; put it in quotes")
        return digest_of(token)
    try:
        raw = bytes.fromhex(digest)
    except (TypeError, ValueError):
        raw = b""
    if len(raw) != hashlib.sha256().digest_size:
        raise ValueError(f"{what}: sha256: expected 64 hexadecimal digits")
    return raw


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)
