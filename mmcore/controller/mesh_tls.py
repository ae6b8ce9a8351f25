"""The TLS that the controller speaks with instances: with a namespace's own keys, from the secret that pods mount.

Whoever that secret's certificates have signed is an instance, by whatever name: the controller knows pods by their
addresses, which no certificate states.
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable
from typing import Final

from mmcore.controller.api import Api, ApiError
from mmcore.controller.mesh import NoInstance
from mmcore.controller.objects import SECRET, Object, Ref
from mmcore.controller.serving_config import ServingConfig
from mmcore.errors import InvalidSetting
from mmcore.transport.tls import peer_context_of

_CERTIFICATE: Final = "tls.crt"
_KEY: Final = "tls.key"
_AUTHORITY: Final = "ca.crt"


async def tls_of(api: Api, config: Callable[[], ServingConfig], namespace: str) -> ssl.SSLContext | None:
    """The context for a namespace's instances; None where the configuration says nothing of TLS.

    Raises:
        NoInstance: the secret cannot be read or used; the text says why.
    """
    name = config().tls_secret
    if not name:
        return None
    try:
        return context_of(await api.get(SECRET, Ref(namespace, name)))
    except (ApiError, InvalidSetting) as error:
        raise NoInstance(f"the secret {name} of {namespace}, which tls.secretName names: {error}") from error


def context_of(secret: Object) -> ssl.SSLContext:
    """The context that a secret's content makes.

    Raises:
        InvalidSetting: it lacks ``tls.crt`` or ``tls.key``, or they cannot be read.
    """
    try:
        data = {key: base64.b64decode(value) for key, value in (secret.get("data") or {}).items()}
        certificate, key = data[_CERTIFICATE], data[_KEY]
    except KeyError as error:
        raise InvalidSetting(f"it has no {error.args[0]}") from None
    except ValueError:
        raise InvalidSetting("it is not in base64") from None
    return peer_context_of(certificate, key, certificate + b"\n" + data.get(_AUTHORITY, b""))
