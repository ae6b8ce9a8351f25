"""Traces by OpenTelemetry: the spans of requests that are sampled, sent to a collector over OTLP.

A request that comes with a W3C ``traceparent`` is traced if that says so; of the others a share is. What is not traced
costs a look at its metadata. The SDK is an extra (``mmcore[tracing]``), imported when tracing is switched on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from typing import Any, Final

from mmcore.errors import InvalidSetting

_PARENT: Final = "traceparent"
_STATE: Final = "tracestate"
#: Where the flags are in ``traceparent`` of version 00 and later ones (W3C Trace Context, section 3.2).
_FLAGS: Final = slice(53, 55)
_PARENT_LENGTH: Final = 55
#: The path that OTLP over HTTP has for traces.
_PATH: Final = "/v1/traces"

Metadata = Iterable[tuple[str, str | bytes]]


def _now_ns() -> int:
    return time.time_ns()


class Tracer:
    """Makes the traces of one instance.

    Args:
        endpoint: of the collector, ``http://host:4318``; spans are posted to ``/v1/traces`` there.
        ratio: the share of requests without a parent that are traced.
        service, instance: what the spans say they come from.
        exporter: where finished spans go instead, an OpenTelemetry SpanExporter.

    Raises:
        InvalidSetting: the SDK is not installed.
    """

    def __init__(
        self, endpoint: str, *, ratio: float, service: str, version: str, instance: str, exporter: Any = None
    ) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON
            from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise InvalidSetting(
                f"--otlp-endpoint needs a package that cannot be imported ({error.name}); "
                "install it with: pip install 'mmcore[tracing]'"
            ) from None
        resource = Resource({"service.name": service, "service.version": version, "service.instance.id": instance})
        # What reaches the SDK has been sampled.
        self._provider = TracerProvider(resource=resource, sampler=ALWAYS_ON, shutdown_on_exit=False)
        url = endpoint.rstrip("/")
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or OTLPSpanExporter(url if url.endswith(_PATH) else url + _PATH, timeout=5))
        )
        self._tracer = self._provider.get_tracer("mmcore", version)
        self._propagator = TraceContextTextMapPropagator()
        self._in_context = set_span_in_context
        self.server_kind: Final = SpanKind.SERVER
        self.client_kind: Final = SpanKind.CLIENT
        self.error_code: Final = StatusCode.ERROR
        self._ratio = ratio

    def request(self, method: str, metadata: Metadata) -> RequestTrace | None:
        """The trace of a request that begins, None for one that is not traced."""
        carrier = {name: value for name, value in metadata if name in (_PARENT, _STATE) and isinstance(value, str)}
        parent = carrier.get(_PARENT, "")
        flags = parent[_FLAGS]
        if len(parent) >= _PARENT_LENGTH and flags.isalnum():
            sampled = bool(int(flags, 16) & 1) if all(one in "0123456789abcdef" for one in flags) else False
        else:
            # One that cannot be read counts as none (section 4.3).
            sampled = random.random() < self._ratio  # noqa: S311  # samples, hides nothing
        if not sampled:
            return None
        return RequestTrace(self, self.start(method, self._propagator.extract(carrier), self.server_kind))

    def start(self, name: str, context: Any, kind: Any = None, start_ns: int | None = None) -> Any:
        """A span of the SDK that begins now, or at ``start_ns`` of the epoch."""
        if kind is None:
            return self._tracer.start_span(name, context, start_time=start_ns)
        return self._tracer.start_span(name, context, kind=kind, start_time=start_ns)

    def within(self, span: Any) -> Any:
        """The context of a span's children."""
        return self._in_context(span)

    def headers(self, span: Any) -> tuple[tuple[str, str], ...]:
        """What tells another process that a span is the parent of its own."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self.within(span))
        return tuple(carrier.items())

    def close(self) -> None:
        """Send what is left, for some seconds at most; not on the loop's thread."""
        self._provider.force_flush(5000)
        self._provider.shutdown()


class RequestTrace:
    """The spans of one request. Times are nanoseconds of the epoch."""

    def __init__(self, tracer: Tracer, span: Any) -> None:
        self._tracer = tracer
        self._span = span
        self._forward: Any = None
        self._over = False
        self.began_ns: Final = _now_ns()

    def headers(self) -> tuple[tuple[str, str], ...]:
        """For who the request is passed on to."""
        return self._tracer.headers(self._forward or self._span)

    def part(self, name: str, began_ns: int, ended_ns: int, **attributes: str | int) -> None:
        """A part that is over; it is not told to begin before the request."""
        began_ns = max(began_ns, self.began_ns)
        span = self._tracer.start(name, self._tracer.within(self._span), start_ns=began_ns)
        span.set_attributes(attributes)
        span.end(max(began_ns, ended_ns))

    def note(self, **attributes: str | int) -> None:
        """Tell more of the request."""
        self._span.set_attributes(attributes)

    def forwarding(self) -> None:
        """It is being passed on from now."""
        if self._forward is None:
            self._forward = self._tracer.start("forward", self._tracer.within(self._span), self._tracer.client_kind)

    def forwarded(self, *, happened: bool = True) -> None:
        """It comes back from there, or was not passed on after all."""
        if self._forward is not None and happened:
            self._forward.end()
        self._forward = None

    def end(self, code: int, details: str) -> None:
        """It is answered with a gRPC status; the first word counts."""
        if self._over:
            return
        self._over = True
        self.forwarded()
        self._span.set_attribute("rpc.grpc.status_code", code)
        if code:
            self._span.set_status(self._tracer.error_code, details)
        self._span.end()
