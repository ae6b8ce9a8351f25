"""How many replicas a runtime is to have: none when no model has wanted it for a while.

Since when no model wants it is noted on the Deployment itself, so that a controller that starts anew goes on counting.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from mmcore.controller.mesh_manifests import scale_bounds
from mmcore.controller.objects import Object, annotations_of, at
from mmcore.controller.runtimes import Runtime
from mmcore.controller.serving_config import ServingConfig

IDLE_SINCE: Final = "serving.kserve.io/idle-since"


@dataclass(frozen=True, slots=True)
class Scale:
    """The replicas to have.

    Attributes:
        replicas: how many.
        idle_since: since when no model wants the runtime, as its Deployment is to note it; empty while one does.
        look_again_s: when the decision may change by the passing of time alone; None: never.
    """

    replicas: int
    idle_since: str = ""
    look_again_s: float | None = None


def scale(runtime: Runtime, config: ServingConfig, found: Object | None, *, wanted: bool, now: datetime) -> Scale:
    """The scale of a runtime that models want or do not; ``found`` is its Deployment."""
    up = _replicas(runtime, config, found)
    if wanted or not config.scale_to_zero:
        return Scale(up)
    noted = annotations_of(found).get(IDLE_SINCE, "") if found is not None else ""
    since = _read(noted)
    if since is None:
        since, noted = now, _write(now)
    if found is None or not at(found, "spec", "replicas"):
        # Nothing is up that could be kept.
        return Scale(0, noted)
    left = config.grace_s - (now - since).total_seconds()
    return Scale(up, noted, left) if left > 0 else Scale(0, noted)


def _replicas(runtime: Runtime, config: ServingConfig, found: Object | None) -> int:
    bounds = scale_bounds(runtime)
    if bounds is None:
        stated = runtime.spec.get("replicas")
        return config.pods_per_runtime if stated is None else int(stated)
    now = int(at(found, "spec", "replicas") or 0) if found is not None else 0
    return min(max(now, bounds[0]), bounds[1])


def _read(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


def _write(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")
