"""Builds the compiled modules of ``mmcore._ext`` from ``ext/``; everything else is in pyproject.toml.

Switches, all environment variables:

``MMCORE_DEBUG=1``     bounds checks, line tracing and annotated C for every module, -O0
``MMCORE_SANITIZE=1``  AddressSanitizer and UndefinedBehaviorSanitizer (run with the sanitizer's library preloaded)
``MMCORE_FUZZ=1``      the same and libFuzzer's counters, by clang, and ``tests/fuzz/native.pyx`` too (``make fuzz``)
``MMCORE_COVERAGE=1``  gcov counters and Cython line tracing (generated C beside its source, where the tracer looks)
``MMCORE_EXT=h2,lru``  build only these modules; ``none`` builds no module
"""

import gzip
import hashlib
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import Cython
import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

DEBUG = os.environ.get("MMCORE_DEBUG") == "1"
SANITIZE = os.environ.get("MMCORE_SANITIZE") == "1"
FUZZ = os.environ.get("MMCORE_FUZZ") == "1"
COVERAGE = os.environ.get("MMCORE_COVERAGE") == "1"
ONLY = {name for name in os.environ.get("MMCORE_EXT", "").split(",") if name}

if FUZZ:
    os.environ |= {"CC": "clang", "LDSHARED": "clang -shared"}

NGHTTP2_MODULES = {"forward", "h2", "h2client", "h2memory", "h2server", "passing"}

KINDS = {"debug": DEBUG, "sanitize": SANITIZE, "fuzz": FUZZ, "coverage": COVERAGE}
NATIVE_TARGETS = Path("tests/fuzz/native.pyx")

DIRECTIVES = {
    "binding": True,
    "embedsignature": False,
    "auto_pickle": False,
    "cdivision": True,
    "boundscheck": DEBUG,
    "wraparound": False,
    "initializedcheck": DEBUG,
    "nonecheck": DEBUG,
    "overflowcheck": False,
    "linetrace": DEBUG or COVERAGE,
}


class BuildExtensions(build_ext):
    """setuptools' build_ext, for one package tree that several kinds of build write into."""

    def copy_extensions_to_source(self) -> None:
        """Copy always: by its times, a module of another kind of build there would pass for the newer one."""
        forced, self.force = self.force, True
        super().copy_extensions_to_source()
        self.force = forced


class ReproducibleSdist(sdist):
    """setuptools' sdist, the same bytes for the same files: no times, owners, or order of a file system."""

    def make_archive(
        self, base_name: str, format: str, root_dir: str | None = None, base_dir: str | None = None,  # noqa: A002
        owner: str | None = None, group: str | None = None,
    ) -> str:  # fmt: skip
        """Write the one format that is published; times are SOURCE_DATE_EPOCH, or 0."""
        if format != "gztar" or root_dir is not None or base_dir is None:
            return str(super().make_archive(base_name, format, root_dir, base_dir, owner, group))
        time = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        path = f"{base_name}.tar.gz"
        with (
            Path(path).open("wb") as file,
            gzip.GzipFile("", "wb", mtime=time, fileobj=file) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for member in [Path(base_dir), *sorted(Path(base_dir).rglob("*"))]:
                archive.add(member, recursive=False, filter=plain)
        return path


def pkg_config(*args: str) -> list[str]:
    """Flags for libnghttp2, or exit with the name of the package to install."""
    try:
        found = subprocess.run(["pkg-config", *args, "libnghttp2 >= 1.43"], capture_output=True, text=True, check=False)
        missing = found.stderr.strip() if found.returncode else ""
    except FileNotFoundError:
        missing = "pkg-config is not installed"
    if missing:
        sys.exit(
            "mmcore needs the nghttp2 library, its headers and pkg-config to build.\n"
            "  Debian, Ubuntu:  apt-get install libnghttp2-dev pkg-config gcc python3-dev\n"
            "  Fedora:          dnf install libnghttp2-devel pkgconf gcc python3-devel\n"
            f"pkg-config says: {missing}"
        )
    return shlex.split(found.stdout)


def extension(source: Path) -> Extension:
    """One compiled module; its name is the file's."""
    name = "tests.fuzz.native" if source == NATIVE_TARGETS else f"mmcore._ext.{source.stem}"
    compile_args = ["-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-Wsign-compare", "-Wno-unused-function"]
    compile_args += ["-O0", "-g3", "-UNDEBUG"] if DEBUG else ["-O2", "-g1"]
    link_args: list[str] = []
    macros: list[tuple[str, str | None]] = [("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")]
    if SANITIZE or FUZZ:
        flags = [
            f"-fsanitize={'fuzzer-no-link,' * FUZZ}address,undefined",
            "-fno-omit-frame-pointer",
            "-fno-sanitize-recover=undefined",
        ]
        compile_args += flags
        # What the fuzzer's modules call is preloaded; clang's own runtime may not even be installed.
        link_args += [] if FUZZ else flags
    if COVERAGE:
        compile_args += ["--coverage"]
        link_args += ["--coverage"]
    if DEBUG or COVERAGE:
        macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")]
    if source.stem in NGHTTP2_MODULES:
        compile_args += pkg_config("--cflags")
        link_args += pkg_config("--libs")
    return Extension(
        name,
        [str(source)],
        include_dirs=[numpy.get_include()],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


def build_base() -> str:
    """A build folder of its own for each set of switches, tools and versions of this file.

    Neither Cython nor setuptools rebuilds when only a directive or a flag changed, so a folder shared by two
    kinds of build would hand one's modules to the other.
    """
    tools = (DEBUG, SANITIZE, FUZZ, COVERAGE, sys.version, Cython.__version__, numpy.__version__)
    digest = hashlib.sha256(Path(__file__).read_bytes() + repr(tools).encode()).hexdigest()[:8]
    kind = "-".join(name for name, on in KINDS.items() if on)
    return f"build/{kind or 'release'}-{digest}"


def declarations_changed(c_folder: Path) -> bool:
    """Whether a module's own .pxd is newer than its C: Cython looks for it beside the .pyx only, not in mmcore/_ext."""
    for declarations in Path("mmcore/_ext").glob("*.pxd"):
        generated = c_folder / f"{declarations.stem}.c"
        if generated.exists() and generated.stat().st_mtime < declarations.stat().st_mtime:
            return True
    return False


SOURCES = [path for path in sorted(Path("ext").glob("*.pyx")) if not ONLY or path.stem in ONLY]
BUILD_BASE = build_base()
BUILD_DIR = None if COVERAGE else f"{BUILD_BASE}/cython"
setup(
    cmdclass={"build_ext": BuildExtensions, "sdist": ReproducibleSdist},
    options={"build": {"build_base": BUILD_BASE}, "build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        [extension(path) for path in [*SOURCES, *[NATIVE_TARGETS] * FUZZ]],
        include_path=["."],
        build_dir=BUILD_DIR,
        force=declarations_changed(Path(BUILD_DIR or ".", "ext")),
        annotate=DEBUG,
        language_level=3,
        compiler_directives=DIRECTIVES,
    ),
)
