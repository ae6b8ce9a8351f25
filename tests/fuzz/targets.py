"""The fuzz targets: each takes any bytes, and any exception that leaves it is a finding.

``make fuzz`` runs them under libFuzzer, those of :data:`NATIVE` without Python in between. A target's module is
imported when it is run: counters of modules that it does not use would have to be looked through for each input.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final

CORPUS: Final = Path(__file__).parent / "corpus"

#: Module and function of each.
TARGETS: Final = {
    "h2_session": "transport:session",
    "grpc_unframing": "transport:unframing",
    "grpc_notation": "transport:notation",
    "protobuf": "codec:protobuf",
    "v2_request": "codec:v2_request",
    "v2_response": "codec:v2_response",
    "tensor": "codec:tensor",
    "rest_infer": "server:rest_infer",
    "server_files": "server:server_files",
    "config_pbtxt": "files:config_pbtxt",
    "config_json": "files:config_json",
    "settings": "files:settings",
    "archive": "files:archive",
    "registry_record": "files:registry_record",
    "worker_frame": "files:worker_frame",
}
#: Those that run no compiled code of ours.
PYTHON: Final = frozenset({"server_files", "config_pbtxt", "config_json", "settings", "archive", "registry_record"})
#: Of ``native.pyx``, each with the target whose corpus it begins with.
NATIVE: Final = {
    "native_protobuf": "protobuf",
    "native_layout": "v2_request",
    "native_contents": "tensor",
    "native_timeout": "grpc_notation",
}


def target(name: str) -> Callable[[bytes], None]:
    """The function of that name."""
    module, _, function = TARGETS[name].partition(":")
    found: Callable[[bytes], None] = getattr(import_module(f"tests.fuzz.{module}"), function)
    return found
