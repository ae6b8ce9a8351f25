"""The secret of TLS as the controller uses it: what cannot be used is told by name."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from mmcore.controller.api import ApiError
from mmcore.controller.mesh import NoInstance
from mmcore.controller.mesh_tls import context_of, tls_of
from mmcore.controller.objects import Kind, Object, Ref
from mmcore.controller.serving_config import ServingConfig
from mmcore.errors import InvalidSetting
from tests.certificates import Authority, self_signed

CONFIG = ServingConfig.read("tls: {secretName: keys}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("keys")
    pair = self_signed(folder, "service")
    files = {"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": Authority(folder).certificate}
    return {name: base64.b64encode(file.read_bytes()).decode() for name, file in files.items()}


def test_the_authority_may_be_missing_and_the_pair_may_not(data: dict[str, str]) -> None:
    assert len(context_of({"data": data}).get_ca_certs()) == 2
    pair = {name: text for name, text in data.items() if name != "ca.crt"}
    assert len(context_of({"data": pair}).get_ca_certs()) == 1
    for missing in ("tls.crt", "tls.key"):
        with pytest.raises(InvalidSetting, match=f"it has no {missing}"):
            context_of({"data": {name: text for name, text in pair.items() if name != missing}})


@pytest.mark.parametrize("text", ["!", base64.b64encode(b"nonsense").decode()])
def test_content_that_is_no_certificate_is_refused(data: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidSetting):
        context_of({"data": {**data, "tls.crt": text}})


class OneSecret:
    """An API server with a secret in one namespace."""

    def __init__(self, data: dict[str, str]) -> None:
        self.item: Object = {"data": data}

    async def get(self, kind: Kind, where: Ref) -> Object:
        if where != Ref("models", "keys"):
            raise ApiError(404, f"{kind.plural} {where} not found")
        return self.item


async def test_the_secret_is_the_namespaces_own(data: dict[str, str]) -> None:
    api: Any = OneSecret(data)
    assert await tls_of(api, ServingConfig, "models") is None
    assert await tls_of(api, lambda: CONFIG, "models") is not None
    with pytest.raises(NoInstance, match=r"the secret keys of other.*not found"):
        await tls_of(api, lambda: CONFIG, "other")
    api.item = {"data": {}}
    with pytest.raises(NoInstance, match=r"has no tls\.crt"):
        await tls_of(api, lambda: CONFIG, "models")
