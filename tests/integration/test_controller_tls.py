"""TLS turned on for a namespace that serves: pods are rolled, and the controller goes on asking them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.controller.objects import POD, PREDICTOR, Object, at
from mmcore.errors import RpcError
from mmcore.transport import Channel
from tests.api_servers import secret
from tests.certificates import Signed, self_signed
from tests.clusters import Cluster, predictor, runtime

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def loaded(scheme: str) -> Callable[[Object], bool]:
    """Whether a Predictor's model is loaded, and told to be asked for with this scheme."""

    def fits(item: Object) -> bool:
        status = item.get("status") or {}
        return (
            status["activeModelState"] == "Loaded"
            and status["available"]
            and not status.get("lastFailureInfo")
            and (status.get("httpEndpoint") or "").startswith(f"{scheme}://")
        )

    return fits


async def rolled(cluster: Cluster, *, secured: bool) -> str:
    """Wait until all pods have TLS, or none has, and are ready; the address of one."""
    async with asyncio.timeout(60):
        while True:
            items, _ = await cluster.api.list(POD, cluster.namespace)
            kinds = ["tls-certs" in {volume["name"] for volume in item["spec"]["volumes"]} for item in items]
            addresses = [at(item, "status", "podIP") for item in items]
            if items and all(addresses) and all(kind is secured for kind in kinds):
                return f"{addresses[0]}:{cluster.grpc_port}"
            await asyncio.sleep(0.05)


async def infer(target: str, context: ssl.SSLContext | None) -> float:
    channel = Channel(target, ssl=context)
    try:
        request = encode_infer_request("m", [("X", "FP32", np.array([5], dtype=np.float32))])
        body = await channel.unary("/inference.GRPCInferenceService/ModelInfer", request, timeout_s=5)
    finally:
        await channel.close()
    return float(decode_infer_response(body).outputs[0].array()[0])


def trusting(pair: Signed, *, shown: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pair.certificate)
    context.check_hostname = False
    if shown:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


async def test_tls_is_turned_on_while_models_are_served(cluster: Cluster, tmp_path: Path) -> None:
    # For the Service's name, which is nowhere asked for: the controller knows pods by their addresses.
    pair = self_signed(tmp_path, f"modelmesh-serving.{cluster.namespace}")
    await cluster.apply(runtime())
    await cluster.apply(predictor("m", "scale-2"))
    await cluster.until(PREDICTOR, "m", loaded("http"))

    await cluster.configure(tls={"secretName": "model-serving-tls", "clientAuth": "require"})
    async with asyncio.timeout(20):
        while "TlsSecretUnusable" not in [reason for reason, _ in await cluster.events("own")]:
            await asyncio.sleep(0.05)
    files = {"tls.crt": pair.certificate.read_text(), "tls.key": pair.key.read_text()}
    await cluster.apply(secret(cluster.namespace, "model-serving-tls", **files))
    target = await rolled(cluster, secured=True)
    await cluster.until(PREDICTOR, "m", loaded("https"))
    # They are asked for a new model over TLS too.
    await cluster.apply(predictor("n", "scale-3"))
    await cluster.until(PREDICTOR, "n", loaded("https"))
    assert await infer(target, trusting(pair, shown=True)) == 10
    for context in (trusting(pair, shown=False), None):
        with pytest.raises(RpcError):
            await infer(target, context)

    await cluster.configure(tls={})
    target = await rolled(cluster, secured=False)
    await cluster.until(PREDICTOR, "m", loaded("http"))
    assert await infer(target, None) == 10
