"""The way to an API server: certificates, tokens that run out, and what servers answer that is no object."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from mmcore.controller.api import Api, ApiError
from mmcore.controller.objects import NAMESPACE, PREDICTOR, Ref
from tests.certificates import Authority
from tests.etcds import free_port

pytestmark = pytest.mark.timeout(60)

ITEM = {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "models"}}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    yield Authority(tmp_path_factory.mktemp("certificates"))


@asynccontextmanager
async def served(answer: Callable[[web.Request], Any], tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that answers all so; where it is."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def write(file: Path, url: str, user: dict[str, str], **cluster: str) -> Path:
    """A kubeconfig."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url, **cluster}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    file.write_text(yaml.safe_dump(content))
    return file


async def namespace(kubeconfig: Path) -> Any:
    api = Api(kubeconfig)
    try:
        return await api.get(NAMESPACE, Ref("", "models"))
    finally:
        await api.close()


async def test_a_client_is_known_by_its_certificate_and_the_server_by_its_authority(
    authority: Authority, tmp_path: Path
) -> None:
    server, own = authority.sign("server", "IP:127.0.0.1"), authority.sign("controller")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.certificate))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(server.certificate, server.key)

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        subject = dict(one[0] for one in request.transport.get_extra_info("peercert")["subject"])
        return web.json_response({**ITEM, "metadata": {"name": subject["commonName"]}})

    shown = {"client-certificate": str(own.certificate), "client-key": str(own.key)}
    trusted = {"certificate-authority": str(authority.certificate)}
    async with served(answer, context) as url:
        found = await namespace(write(tmp_path / "both", url, shown, **trusted))
        assert found["metadata"]["name"] == "controller"
        for lacking in (write(tmp_path / "nobody", url, {}, **trusted), write(tmp_path / "anybody", url, shown)):
            with pytest.raises(ApiError, match="does not answer"):
                await namespace(lacking)


async def test_a_token_that_has_run_out_is_read_anew(tmp_path: Path) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.headers["Authorization"])
        if asked[-1] != "Bearer second":
            return web.json_response({"message": "Unauthorized"}, status=401)
        return web.json_response(ITEM)

    async with served(answer) as url:
        file = write(tmp_path / "config", url, {"token": "first"})
        api = Api(file)
        try:
            with pytest.raises(ApiError) as error:
                await api.get(NAMESPACE, Ref("", "models"))
            assert error.value.code == 401
            write(file, url, {"token": "second"})
            assert await api.get(NAMESPACE, Ref("", "models")) == ITEM
        finally:
            await api.close()
    # Once with the token that was known, once with the one that the file has.
    assert asked == ["Bearer first", "Bearer first", "Bearer first", "Bearer second"]


async def test_a_watch_tells_long_lines_in_pieces_and_refusals_within_it(tmp_path: Path) -> None:
    long = "x" * 300_000
    lines = [
        b'{"type":"ADDED","object":{"metadata":{"name":"a"},"spec":"%s"}}\n' % long.encode(),
        b'{"type":"ERROR","object":{"code":410,"message":"too old resource version"}}\n',
    ]

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        text = b"".join(lines)
        for start in range(0, len(text), 50_000):
            await response.write(text[start : start + 50_000])
            await asyncio.sleep(0)
        return response

    async with served(answer) as url:
        api, told = Api(write(tmp_path / "config", url, {})), []
        try:
            with pytest.raises(ApiError, match="too old") as error:
                async for kind, item in api.watch(PREDICTOR, "models", "5"):
                    told.append((kind, len(item["spec"])))
        finally:
            await api.close()
    assert told == [("ADDED", len(long))]
    assert error.value.gone


async def test_a_server_that_is_not_there_or_answers_no_json_is_told(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="does not answer") as error:
        await namespace(write(tmp_path / "gone", f"http://127.0.0.1:{free_port()}", {}))
    assert error.value.code == 0
    with pytest.raises(ApiError, match="no API server is configured"):
        await namespace(tmp_path / "missing")

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="<html>Bad Gateway</html>", status=502)

    async with served(answer) as url:
        with pytest.raises(ApiError, match="Bad Gateway") as error:
            await namespace(write(tmp_path / "proxy", url, {}))
    assert error.value.code == 502
