"""What the models of all frameworks have in common, beside what answers."""

from __future__ import annotations

from collections.abc import Mapping

from mmcore.errors import InvalidRequest
from mmcore.model import TensorSpec
from mmcore.runtimes.failures import FailureReport


class BuiltinModel:
    """A model's description, as ``LoadedModel`` tells of each; a framework's own class adds ``infer`` and ``close``."""

    any_input_name = False

    def __init__(
        self,
        name: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        default_outputs: tuple[str, ...],
        size_bytes: int,
        accepts: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        self.default_outputs = default_outputs
        self.accepts: Mapping[str, tuple[str, ...]] = accepts or {}
        self.size_bytes = size_bytes
        self._failures = FailureReport(name)

    def unknown_output(self, name: str) -> InvalidRequest:
        """The error for a request that asks for an output that is not there."""
        known = ", ".join(repr(spec.name) for spec in self.outputs)
        return InvalidRequest(f"model {self.name!r} has no output {name!r}; it has {known}")
