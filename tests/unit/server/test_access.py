"""The guard before the methods: which calls pass it, by token, scope, model and count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmcore._ext.v2codec import encode_infer_request
from mmcore.errors import Overloaded, PermissionDenied, Unauthenticated
from mmcore.pb import inference_pb2 as pb
from mmcore.server import access
from mmcore.server.access import Access, Addresses
from mmcore.server.dataplane import parse_dataplane_config
from mmcore.server.tokens import parse_tokens
from mmcore.server.watched import WatchedCall

V2 = "/inference.GRPCInferenceService/"
INFER = f"{V2}ModelInfer"
TOKENS = """
- {name: all, token: all, scopes: [infer]}
- {name: boss, token: boss, scopes: [manage]}
- {name: some, token: some, scopes: [infer], models: ["fraud-*", exact]}
- {name: slow, token: slow, scopes: [infer], requests_per_s: 2}
- {name: few, token: few, scopes: [infer], concurrent: 2}
"""


class Call:
    """A call as a service sees it."""

    deadline = None
    cancelled = False

    def __init__(self, token: str | None, *metadata: tuple[str, str | bytes]) -> None:
        self.metadata = (*((("authorization", f"Bearer {token}"),) if token is not None else ()), *metadata)
        self.on_cancel: Callable[[], object] | None = None
        self.answered: list[Any] = []

    def reply(self, message: Any) -> None:
        self.answered.append(message)

    def fail(self, status: int, details: str) -> None:
        self.answered.append((status, details))


def guarded(path: str, handler: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
    return Access(parse_tokens(TOKENS), **settings).unary(path, handler or (lambda call, body: b"answer"))


def asking(model: str) -> bytes:
    return pb.ModelInferRequest(model_name=model).SerializeToString()


@pytest.mark.parametrize("value", ["", "Basic all", "Bearer", "Bearer nobody", "Bearer ALL", "all"])
def test_no_token_or_an_unknown_one_is_nobody(value: str) -> None:
    call = Call(None, *((("authorization", value),) if value else ()))
    with pytest.raises(Unauthenticated):
        guarded(INFER)(call, asking("m"))


def test_two_tokens_are_none() -> None:
    with pytest.raises(Unauthenticated):
        guarded(INFER)(Call("all", ("authorization", "Bearer some")), asking("m"))


@pytest.mark.parametrize("scheme", ["Bearer all", "bearer all", "BEARER  all"])
def test_a_token_passes(scheme: str) -> None:
    assert guarded(INFER)(Call(None, ("authorization", scheme)), asking("m")) == b"answer"


@pytest.mark.parametrize("path", [f"{V2}ServerLive", f"{V2}ServerReady", "/grpc.health.v1.Health/Check"])
def test_probes_need_no_token(path: str) -> None:
    assert guarded(path)(Call(None), b"") == b"answer"


@pytest.mark.parametrize(
    "path",
    [
        "/mmesh.ModelMesh/registerModel", "/mmcore.Cluster/Instances", f"{V2}RepositoryModelLoad",
        f"{V2}RepositoryIndex", f"{V2}LogSettings", f"{V2}TraceSetting",
    ],
)  # fmt: skip
def test_management_has_a_scope_of_its_own(path: str) -> None:
    assert guarded(path)(Call("boss"), b"") == b"answer"
    with pytest.raises(PermissionDenied, match="all lacks the scope 'manage'"):
        guarded(path)(Call("all"), b"")
    with pytest.raises(PermissionDenied, match="boss lacks the scope 'infer'"):
        guarded(INFER)(Call("boss"), asking("m"))


def test_management_can_be_closed() -> None:
    guard = Access(None, manages=False)
    with pytest.raises(PermissionDenied, match="not served on this port"):
        guard.unary("/mmesh.ModelMesh/registerModel", lambda call, body: b"answer")(Call(None), b"")  # type: ignore[arg-type]
    assert guard.unary(INFER, lambda call, body: b"answer")(Call(None), b"") == b"answer"  # type: ignore[arg-type]


def test_a_token_for_some_models_is_for_no_other() -> None:
    infer = guarded(INFER)
    for model in ("fraud-1", "fraud-", "exact"):
        assert infer(Call("some"), asking(model)) == b"answer"
    for model in ("other", "Fraud-1", "xfraud-1", "exactly"):
        with pytest.raises(PermissionDenied, match=f"some may not use model '{model}'"):
            infer(Call("some"), asking(model))


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelReady", "ModelConfig", "ModelStatistics"])
def test_what_is_told_of_models_is_limited_likewise(method: str) -> None:
    ask = guarded(f"{V2}{method}")
    request = getattr(pb, f"{method}Request")
    assert ask(Call("some"), request(name="exact").SerializeToString()) == b"answer"
    with pytest.raises(PermissionDenied):
        ask(Call("some"), request(name="other").SerializeToString())
    with pytest.raises(PermissionDenied, match="every model; name one"):
        ask(Call("some"), b"")


def test_the_name_that_counts_is_looked_at() -> None:
    """Of a repeated field the last value counts, for the guard as for who answers."""
    twice = asking("exact") + asking("other")
    assert pb.ModelInferRequest.FromString(twice).model_name == "other"
    with pytest.raises(PermissionDenied):
        guarded(INFER)(Call("some"), twice)


def test_names_in_headers_are_looked_at() -> None:
    infer = guarded(INFER)
    assert infer(Call("some", ("mm-model-id", "exact"), ("mm-model-id", "fraud-2")), asking("")) == b"answer"
    assert infer(Call("some", ("mm-vmodel-id-bin", b"exact")), asking("")) == b"answer"
    for metadata in (
        [("mm-model-id", "exact"), ("mm-model-id", "other")],
        [("mm-vmodel-id", "other")],
        [("mm-vmodel-id-bin", b"other")],
        [("mm-model-id", "exact"), ("mm-vmodel-id", "exact")],
    ):
        with pytest.raises(PermissionDenied):
            infer(Call("some", *metadata), asking(""))


def test_the_name_is_where_the_configuration_says() -> None:
    config = parse_dataplane_config('{"rpcConfigs": {"my.Service/Ask": {"idExtractionPath": [3]}}}')
    ask = guarded("/my.Service/Ask", config=lambda: config)
    assert ask(Call("some"), b"\x0a\x05other\x1a\x05exact") == b"answer"
    with pytest.raises(PermissionDenied):
        ask(Call("some"), b"\x0a\x05exact\x1a\x05other")


def test_the_name_is_where_a_known_service_has_it() -> None:
    predict = guarded("/tensorflow.serving.PredictionService/Predict")
    spec = b"\x0a\x05other\x1a\x07fraud-1"  # model_spec: name, signature_name
    with pytest.raises(PermissionDenied):
        predict(Call("some"), b"\x0a" + bytes([len(spec)]) + spec)
    assert predict(Call("some"), b"\x0a\x07\x0a\x05exact") == b"answer"


async def test_a_stream_that_is_read_elsewhere_is_for_those_who_may_use_every_model() -> None:
    served: list[Any] = []

    async def serve(call: Any) -> None:
        served.append(call)

    guard = Access(parse_tokens(TOKENS))
    whole, each = guard.stream("/my.Service/Chat", serve), guard.stream(f"{V2}ModelStreamInfer", serve, each=True)
    for stream, token in ((whole, "all"), (each, "all"), (each, "some")):
        await stream(Call(token))  # type: ignore[arg-type]
    assert len(served) == 3
    with pytest.raises(PermissionDenied, match="every model"):
        await whole(Call("some"))  # type: ignore[arg-type]
    for stream in (whole, each):
        with pytest.raises(Unauthenticated):
            await stream(Call(None))  # type: ignore[arg-type]


def test_so_many_requests_pass_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: now[0])
    infer = guarded(INFER)
    assert [infer(Call("slow"), asking("m")) for _ in range(2)] == [b"answer"] * 2
    with pytest.raises(Overloaded, match=r"slow is above its 2 requests per second; retry in 0\.500 s"):
        infer(Call("slow"), asking("m"))
    assert infer(Call("all"), asking("m")) == b"answer"
    now[0] += 0.5
    assert infer(Call("slow"), asking("m")) == b"answer"
    now[0] += 60
    assert [infer(Call("slow"), asking("m")) for _ in range(2)] == [b"answer"] * 2
    with pytest.raises(Overloaded):
        infer(Call("slow"), asking("m"))


def test_so_many_calls_are_under_way_at_once() -> None:
    waiting: list[Any] = []

    def later(call: Any, body: bytes) -> None:
        call.on_cancel = lambda: None
        waiting.append(call)

    infer = guarded(INFER, later)
    calls = [Call("few") for _ in range(4)]
    infer(calls[0], asking("m"))
    infer(calls[1], asking("m"))
    with pytest.raises(Overloaded, match="few has 2 calls under way, its limit"):
        infer(calls[2], asking("m"))
    waiting[0].reply(b"answer")
    assert calls[0].answered == [b"answer"]
    infer(calls[2], asking("m"))
    assert calls[1].on_cancel is not None
    calls[1].on_cancel()
    calls[1].on_cancel()
    infer(calls[3], asking("m"))
    with pytest.raises(Overloaded):
        infer(Call("few"), asking("m"))


@pytest.mark.parametrize("answer", [b"answer", ValueError("no")])
def test_a_call_that_is_answered_at_once_counts_no_longer(answer: bytes | Exception) -> None:
    def at_once(call: Any, body: bytes) -> bytes:
        if isinstance(answer, Exception):
            raise answer
        return answer

    infer = guarded(INFER, at_once)
    for _ in range(5):
        if isinstance(answer, Exception):
            with pytest.raises(ValueError):
                infer(Call("few"), asking("m"))
        else:
            assert infer(Call("few"), asking("m")) == answer


def test_a_renewed_file_counts_from_the_next_call_on() -> None:
    guard = Access(parse_tokens(TOKENS))
    infer: Any = guard.unary(INFER, lambda call, body: None)
    held = Call("few")
    infer(held, asking("m"))
    guard.renew(parse_tokens(TOKENS.replace("token: all", "token: new")))
    assert infer(Call("new"), asking("m")) is None
    with pytest.raises(Unauthenticated):
        infer(Call("all"), asking("m"))
    infer(Call("few"), asking("m"))
    with pytest.raises(Overloaded):  # those under way before are counted still
        infer(Call("few"), asking("m"))


def test_an_encoded_request_is_read_as_sent() -> None:
    body = encode_infer_request("exact", [])
    joined = b"".join(map(bytes, body)) if isinstance(body, list) else bytes(body)
    assert guarded(INFER)(Call("some"), joined) == b"answer"


def test_a_call_that_is_watched_stays_that_call() -> None:
    """Tracing and payload logs stand before the guard: it sees through to who sent the call, and adds no layer."""
    seen: list[Any] = []
    infer = guarded(INFER, lambda call, body: seen.append(call))
    from_instance = Call(None)
    from_instance.internal = True  # type: ignore[attr-defined]
    infer(WatchedCall(from_instance, None), asking("m"))
    watched = [WatchedCall(Call("few"), None) for _ in range(3)]
    infer(watched[0], asking("m"))
    infer(watched[1], asking("m"))
    assert seen[1:] == watched[:2]
    with pytest.raises(Overloaded):
        infer(watched[2], asking("m"))
    watched[0].reply(b"answer")
    infer(watched[2], asking("m"))


class From(Call):
    """A call without a token from an address."""

    def __init__(self, peer: str) -> None:
        super().__init__(None)
        self.peer = peer


def test_each_address_has_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: now[0])
    call = Access(None, addresses=Addresses(2.0, 0)).unary(INFER, lambda call, body: b"answer")
    for _ in range(2):
        assert call(From("10.0.0.1:5000"), b"") == b"answer"
    with pytest.raises(Overloaded, match=r"10\.0\.0\.1 is above its 2 requests per second"):
        call(From("10.0.0.1:5001"), b"")
    assert call(From("10.0.0.2:5000"), b"") == b"answer"
    assert call(From("unix"), b"") == b"answer"
    now[0] += 0.6
    assert call(From("10.0.0.1:5002"), b"") == b"answer"


def test_a_host_does_not_get_more_by_having_many_addresses() -> None:
    call = Access(None, addresses=Addresses(1.0, 0)).unary(INFER, lambda call, body: b"answer")
    assert call(From("2001:db8:1:2::1:5000"), b"") == b"answer"
    with pytest.raises(Overloaded):
        call(From("2001:db8:1:2:ffff::9:5000"), b"")
    assert call(From("2001:db8:1:3::1:5000"), b"") == b"answer"


def test_each_address_has_so_many_under_way() -> None:
    held: list[Any] = []
    call = Access(None, addresses=Addresses(0.0, 1)).unary(INFER, lambda call, body: held.append(call))
    call(From("10.0.0.1:1"), b"")
    with pytest.raises(Overloaded, match="has 1 calls under way"):
        call(From("10.0.0.1:2"), b"")
    call(From("10.0.0.2:1"), b"")
    held[0].reply(b"answer")
    call(From("10.0.0.1:3"), b"")


def test_addresses_are_bounded_and_probes_and_instances_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_MOST_ADDRESSES", 3)
    addresses = Addresses(1.0, 0)
    guard = Access(None, addresses=addresses)
    call = guard.unary(INFER, lambda call, body: b"answer")
    for number in range(10):
        assert call(From(f"10.0.0.{number}:1"), b"") == b"answer"
    assert len(addresses._callers) == 3
    other = From("10.0.0.9:1")
    other.internal = True  # type: ignore[attr-defined]
    assert call(other, b"") == b"answer"
    handler = lambda call, body: b"live"  # noqa: E731
    assert guard.unary(f"{V2}ServerLive", handler) is handler
    with pytest.raises(Overloaded):
        guard.unary(f"{V2}RepositoryIndex", handler)(From("10.0.0.9:2"), b"")
