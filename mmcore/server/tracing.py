"""The trace extension: every n-th request of a model, its times in nanoseconds, as one line of JSON in the log.

Setting names and the way values fall back (model, then server, then default) are those of Triton's trace extension.
There is no trace file, since a client must not choose where a server writes, and no level TENSORS, since payloads are
never logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from mmcore.errors import InvalidRequest, NotFound
from mmcore.pb import inference_pb2
from mmcore.routing import Router

log = logging.getLogger(__name__)

_DEFAULTS: Final[dict[str, tuple[str, ...]]] = {
    "trace_level": ("OFF",),
    "trace_rate": ("1000",),
    "trace_count": ("-1",),
    "trace_mode": ("triton",),
}


@dataclass(slots=True)
class Sampler:
    """Which requests of one model are traced; counts down what is left of ``trace_count``."""

    rate: int
    left: int
    seen: int = 0

    def take(self) -> bool:
        """Whether this request is one of those traced."""
        self.seen += 1
        if self.seen % self.rate or not self.left:
            return False
        self.left -= self.left > 0
        return True


class Tracing:
    """The settings of the server and of single models, and what becomes of a traced request.

    Attributes:
        active: whether any model is traced at all.
        on_change: told ``active`` after each change of the settings.
    """

    def __init__(self, router: Router) -> None:
        self.active = False
        self.on_change: Callable[[bool], None] = lambda active: None
        self._router = router
        self._server: dict[str, tuple[str, ...]] = {}
        self._models: dict[str, dict[str, tuple[str, ...]]] = {}
        self._samplers: dict[str, Sampler | None] = {}

    def update(self, request: inference_pb2.TraceSettingRequest) -> inference_pb2.TraceSettingResponse:
        """Change the settings that the request names, all or none, and answer the ones now in force.

        Raises:
            InvalidRequest: an unknown setting or a value it cannot take.
            NotFound: settings for a model that does not exist.
        """
        name = request.model_name
        if name and not self._router.versions(name):
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        wanted = {key: tuple(setting.value) for key, setting in request.settings.items()}
        for key, values in wanted.items():
            _check(key, values)
        if wanted:
            level = self._models.setdefault(name, {}) if name else self._server
            for key, values in wanted.items():
                if values:
                    level[key] = values
                else:
                    # A setting without values falls back to the level above.
                    level.pop(key, None)
            self._samplers.clear()
            self.active = any(
                "TIMESTAMPS" in settings["trace_level"]
                for settings in (self._in_force(""), *(self._in_force(model) for model in self._models))
            )
            self.on_change(self.active)
        response = inference_pb2.TraceSettingResponse()
        for key, values in self._in_force(name).items():
            response.settings[key].value.extend(values)
        return response

    def observe(self, name: str, version: str, request_id: str, stamps: Mapping[str, int]) -> None:
        """Log one finished request if it is one of those traced; ``stamps`` are names to monotonic nanoseconds."""
        if name not in self._samplers:
            settings = self._in_force(name)
            traced = "TIMESTAMPS" in settings["trace_level"]
            self._samplers[name] = (
                Sampler(int(settings["trace_rate"][0]), int(settings["trace_count"][0])) if traced else None
            )
        sampler = self._samplers[name]
        if sampler is not None and sampler.take():
            timestamps = [{"name": stamp, "ns": ns} for stamp, ns in stamps.items()]
            trace = {"model_name": name, "model_version": version, "id": request_id, "timestamps": timestamps}
            log.info("trace %s", json.dumps(trace))

    def _in_force(self, name: str) -> dict[str, tuple[str, ...]]:
        return {**_DEFAULTS, **self._server, **self._models.get(name, {})}


def _check(key: str, values: tuple[str, ...]) -> None:
    if key == "trace_file":
        raise InvalidRequest("trace file location can not be updated through network protocol; traces go to the log")
    if key not in _DEFAULTS:
        raise InvalidRequest(f"unknown trace setting '{key}'; known are {', '.join(_DEFAULTS)}")
    if not values:
        return
    allowed = {"trace_level": {"OFF", "TIMESTAMPS"}, "trace_mode": {"triton"}}.get(key)
    if allowed is not None:
        for value in values:
            if value not in allowed:
                raise InvalidRequest(f"{key} '{value}' is not served; one of {', '.join(sorted(allowed))}")
        return
    lowest = 1 if key == "trace_rate" else -1
    try:
        acceptable = len(values) == 1 and int(values[0]) >= lowest
    except ValueError:
        acceptable = False
    if not acceptable:
        raise InvalidRequest(f"{key} takes one whole number of at least {lowest}, got {', '.join(values)}")
