"""Which runtime a model goes to: by its name, or by format, version, protocol and priority."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmcore.controller.objects import SERVING_RUNTIME
from mmcore.controller.runtimes import Format, Runtime
from mmcore.controller.wanted import WantedModel


@dataclass(frozen=True, slots=True)
class Unfit:
    """No runtime fits.

    Attributes:
        reason: as the status states it: NoSupportingRuntime, RuntimeNotRecognized or RuntimeDisabled.
        message: the sentence that the archived controller says, which its users look for.
        detail: what of the runtimes that there are does not fit.
    """

    reason: str
    message: str
    detail: str


def select(model: WantedModel, runtimes: Sequence[Runtime]) -> Runtime | Unfit:
    """The runtime for a model out of those that count in its namespace.

    One that a model names is taken whatever its formats say. Among those that select the format themselves a
    namespace's own go before the cluster's, then the highest priority, then the eldest: a runtime that is added later
    takes no models over unless it asks for them.
    """
    if model.runtime:
        return _named(model.runtime, runtimes)
    fitting = [
        (one.kind is not SERVING_RUNTIME, -max(entry.priority for entry in entries), one.created, one.name, one)
        for one in runtimes
        if one.multi_model and not one.disabled and (entries := _entries(model, one)) and _speaks(one, model.protocol)
    ]
    if fitting:
        return min(fitting, key=lambda entry: entry[:4])[4]
    return _reason(model, runtimes)


def version_fits(wanted: str, listed: str) -> bool:
    """Whether a model's version is served by a runtime that lists one: ``1.15`` is by ``1`` and by ``1.15``.

    Models that state no version are served by any, and runtimes that list none serve any.
    """
    if not wanted or not listed:
        return True
    asked, has = wanted.split("."), listed.split(".")
    return asked[: len(has)] == has


def _entries(model: WantedModel, runtime: Runtime) -> list[Format]:
    return [
        entry
        for entry in runtime.formats
        if entry.auto_select and entry.name == model.format and version_fits(model.version, entry.version)
    ]


def _speaks(runtime: Runtime, protocol: str) -> bool:
    """Whether it answers requests in this protocol; v2 over REST is answered where v2 over gRPC is."""
    return not protocol or protocol in runtime.protocols or (protocol == "v2" and "grpc-v2" in runtime.protocols)


def _named(name: str, runtimes: Sequence[Runtime]) -> Runtime | Unfit:
    found = next((one for one in runtimes if one.name == name), None)
    if found is None:
        known = ", ".join(one.name for one in runtimes) or "none"
        return Unfit("RuntimeNotRecognized", "Specified runtime name not recognized", f"the runtimes are: {known}")
    if found.disabled:
        return Unfit("RuntimeDisabled", "Specified runtime is disabled", f"'{name}' is disabled")
    if not found.multi_model:
        detail = f"'{name}' is not a multi-model runtime"
        return Unfit("NoSupportingRuntime", "Specified runtime does not serve several models", detail)
    return found


def _reason(model: WantedModel, runtimes: Sequence[Runtime]) -> Unfit:
    message = "No ServingRuntime supports specified model type and/or protocol"
    of_format = [one for one in runtimes if any(entry.name == model.format for entry in one.formats)]
    if not of_format:
        known = sorted({entry.name for one in runtimes for entry in one.formats if one.multi_model})
        return Unfit("NoSupportingRuntime", message, f"no runtime lists the format '{model.format}', only {known}")
    facts = []
    for one in of_format:
        facts.append(f"'{one.name}' {_misfit(model, one)}")
    fitting = [one for one in of_format if one.multi_model and _entries(model, one) and _speaks(one, model.protocol)]
    reason = "RuntimeDisabled" if fitting else "NoSupportingRuntime"
    return Unfit(reason, message, "; ".join(facts))


def _misfit(model: WantedModel, runtime: Runtime) -> str:
    entries = [entry for entry in runtime.formats if entry.name == model.format]
    if not runtime.multi_model:
        return "is not a multi-model runtime"
    if not any(version_fits(model.version, entry.version) for entry in entries):
        return f"lists version {' and '.join(entry.version for entry in entries)}, not {model.version}"
    if not _entries(model, runtime):
        return "does not select it by itself (autoSelect); name the runtime to use it"
    if not _speaks(runtime, model.protocol):
        return f"speaks {', '.join(runtime.protocols) or 'no stated protocol'}, not {model.protocol}"
    return "is disabled"
