"""From the text of ``--registry`` to a registry."""

from __future__ import annotations

from pathlib import Path

from mmcore.registry.memory import MemoryStore
from mmcore.registry.registry import LEASE_S, Registry
from mmcore.registry.store import Store


def open_registry(url: str, instance: str, *, lease_s: float = LEASE_S) -> Registry:
    """The registry at ``url``, not started yet.

    ``memory:`` is one for this instance alone; ``sqlite:PATH`` for the processes of one machine;
    ``etcd://host:port[,host:port]/prefix``, ``etcds://`` with TLS, or ``etcd:FILE`` with a connection file, for
    instances on any machine. The file is read again when it changes.

    Raises:
        ValueError: the text is no address of a registry.
    """
    return Registry(_store(url), instance, lease_s=lease_s)


def registry_url(url: str) -> str:
    """The text itself, if there can be a registry at it.

    Raises:
        ValueError: it is no address of a registry, or names a file that does not say what it must.
    """
    _store(url)
    return url


def _store(url: str) -> Store:
    if url == "memory:":
        return MemoryStore()
    if url.startswith("sqlite:") and url != "sqlite:":
        from mmcore.registry.sqlite import SqliteStore

        return SqliteStore(Path(url.removeprefix("sqlite:")))
    if url.startswith(("etcd:", "etcds:")):
        from mmcore.registry.etcd import etcd_store

        return etcd_store(url)
    raise ValueError(f"{url!r} is not a registry; write memory:, sqlite:PATH or etcd://host:port/prefix")
