"""Model files that are on this machine already: local paths, and claims mounted by name below one folder."""

from __future__ import annotations

import os
from pathlib import Path

from mmcore.errors import LoadFailed
from mmcore.storage.containment import inside
from mmcore.storage.places import Place


def mounted(place: Place, path: str, pvc_mounts: Path) -> Path | None:
    """Where ``path`` of a place is on this machine; None when it is at a remote store.

    Raises:
        LoadFailed: it does not exist, or leads out of its claim.
    """
    if place.type == "pvc":
        name = place.required("name")
        base = pvc_mounts / name
        if name in (".", "..") or "/" in name or not base.is_dir():
            raise LoadFailed(f"the claim '{name}' is not mounted at {base}")
        relative = path.strip("/")
        found = inside(base, relative, f"claim '{name}'") if relative else base
        if not found.exists():
            raise LoadFailed(f"the claim '{name}' has no '{relative}'")
        return found
    if place.type == "local":
        found = Path(path)
        if not found.is_absolute():
            raise LoadFailed(f"a local path must be absolute, got '{path}'")
        if not os.path.lexists(found):
            raise LoadFailed(f"{found} does not exist")
        return found
    return None
