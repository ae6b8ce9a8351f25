"""Builds the compiled peers into build/bench, again when their sources changed."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Final

from bench.processes import ROOT

FOLDER: Final = ROOT / "build" / "bench"
PEERS: Final = ROOT / "bench" / "peers"


class NotMeasured(Exception):
    """A peer cannot be built here; the text says what to install."""


def raw_c() -> Path:
    """The echo over nghttp2 alone."""
    source = PEERS / "raw_c" / "echo.c"
    binary = FOLDER / "raw_c" / "echo"
    if _stale(binary, source):
        _run("install gcc libnghttp2-dev", "gcc", "-O2", "-o", str(binary), str(source), "-lnghttp2")
    return binary


def relay() -> Path:
    """The relay of bytes."""
    source = PEERS / "relay" / "relay.c"
    binary = FOLDER / "relay" / "relay"
    if _stale(binary, source):
        _run("install gcc", "gcc", "-O2", "-pthread", "-o", str(binary), str(source))
    return binary


def grpc_cpp() -> Path:
    """The callback server of gRPC C++, from Debian's packages."""
    hint = "install libgrpc++-dev protobuf-compiler-grpc g++ pkg-config"
    folder = PEERS / "grpc_cpp"
    source, proto = folder / "echo.cc", folder / "echo.proto"
    binary = FOLDER / "grpc_cpp" / "echo"
    if _stale(binary, source, proto):
        out = binary.parent
        plugin = _run(hint, "which", "grpc_cpp_plugin").strip()
        flags = shlex.split(_run(hint, "pkg-config", "--cflags", "--libs", "grpc++", "protobuf"))
        _run(hint, "protoc", f"--plugin=protoc-gen-grpc={plugin}", "-I", str(folder), f"--cpp_out={out}",
             f"--grpc_out={out}", proto.name)  # fmt: skip
        generated = [str(out / "echo.pb.cc"), str(out / "echo.grpc.pb.cc")]
        _run(hint, "g++", "-std=c++17", "-O2", f"-I{out}", "-o", str(binary), str(source), *generated, *flags)
    return binary


def _stale(binary: Path, *sources: Path) -> bool:
    binary.parent.mkdir(parents=True, exist_ok=True)
    return not binary.exists() or binary.stat().st_mtime < max(source.stat().st_mtime for source in sources)


def _run(hint: str, *argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=180)
    except FileNotFoundError:
        raise NotMeasured(f"{hint} ({argv[0]} is missing)") from None
    except subprocess.CalledProcessError as failure:
        raise NotMeasured(f"{hint} ({argv[0]} says: {failure.stderr.strip()[-500:]})") from None
    return done.stdout
