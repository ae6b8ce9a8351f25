"""What README.md and docs/ show is true: commands run, links lead somewhere, tables list what there is.

A block of commands is run (``run by the tests``), started (``started by the tests``: servers, ended when they are
ready), or, where it cannot be run here, looked at (``checked by the tests…``): each command by what knows its program.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import helm_python
import pytest
import yaml
from google.protobuf import descriptor_pb2

from bench.__main__ import SUITES
from docs import reference
from mmcore import pb
from mmcore.cli.main import COMMANDS, group
from mmcore.cli.runtime import command as runtime_command
from mmcore.cli.serve import command as serve_command
from mmcore.server.rest.routes import ROUTES
from mmcore.storage import settings
from tests.overlays import charted
from tests.serving import Instance, Serve

ROOT = Path(__file__).parents[2]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
#: What lies beside the code, for who works on it.
BESIDE = {name: (ROOT / name).read_text() for name in ("bench/README.md", "deploy/samples/README.md", "ext/README.md")}
MAKEFILE = (ROOT / "Makefile").read_text()
#: The addresses of the examples, where the fixture's server has other ports.
ADDRESS = "127.0.0.1:8033"
REST_ADDRESS = "127.0.0.1:8008"
METRICS_ADDRESS = "127.0.0.1:2112"
#: Pages are to be read in one sitting.
LONGEST_PAGE = 150

RUN = "run by the tests"
STARTED = "started by the tests"
CHECKED = "checked by the tests"
SERVED = "served by the tests as "


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its language, its text, and the comment on the line before it."""

    page: str
    language: str
    text: str
    mark: str

    @property
    def commands(self) -> Iterator[list[str]]:
        """Its commands in words, without pipes and comments; a word begins where the shell would begin one."""
        pending = ""
        for line in self.text.splitlines():
            pending += line
            if line.endswith("\\"):
                pending = pending[:-1]
                continue
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quotation that goes on
                pending += "\n"
                continue
            pending = ""
            if words:
                yield words[: words.index("|")] if "|" in words else words[:-1] if words[-1] == "&" else words
        assert not pending, pending


BLOCKS = [
    Block(page, match["language"], match["text"], match["mark"] or "")
    for page, text in (PAGES | BESIDE).items()
    for match in re.finditer(
        r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
]
SHELL = [block for block in BLOCKS if block.language == "sh"]


def named(block: Block) -> str:
    return f"{block.page}: {block.text.splitlines()[0]}"


def marked(mark: str) -> list[Block]:
    return [block for block in BLOCKS if block.mark == mark]


# What is run.


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample models of ``make run``, and the model that the documentation shows."""
    folder = tmp_path_factory.mktemp("tree") / "build/samples"
    subprocess.run(
        [sys.executable, ROOT / "deploy/samples/train.py", folder], check=True, capture_output=True, timeout=300
    )
    for block in BLOCKS:
        if block.mark.startswith(SERVED):
            file = folder / block.mark.removeprefix(SERVED)
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text)
    return folder


@pytest.fixture(scope="module")
def instance(serve_for_session: Serve, samples: Path) -> Instance:
    """A server of these models."""
    return serve_for_session(samples)


@pytest.fixture
def tree(tmp_path: Path, samples: Path) -> Path:
    """Where commands are typed: a folder like a clone after ``make run``."""
    (tmp_path / "build").symlink_to(samples.parent)
    for name in ("deploy", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | more


@pytest.mark.slow
@pytest.mark.parametrize("block", marked(RUN), ids=named)
def test_example_runs_as_shown(block: Block, instance: Instance, tree: Path) -> None:
    text = block.text.replace(ADDRESS, instance.grpc).replace(REST_ADDRESS, instance.rest)
    text = text.replace(METRICS_ADDRESS, instance.metrics)
    argv = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=60, cwd=tree,
        env=environment(MMCORE_TARGET=instance.grpc),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert '{"error"' not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("block", marked(STARTED), ids=named)
def test_server_starts_as_shown(block: Block, tree: Path) -> None:
    ports = {"MMCORE_GRPC_PORT": "0", "MMCORE_REST_PORT": "0", "MMCORE_METRICS_PORT": "0"}
    for words in block.commands:
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tree, env=environment(**ports))
        # One that hangs is to fail the test, not to hold it up.
        timer = threading.Timer(60, server.kill)
        timer.start()
        try:
            assert server.stdout is not None
            assert json.loads(server.stdout.readline())["event"] == "ready"
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            timer.cancel()
            server.kill()
            server.communicate(timeout=10)


@pytest.mark.slow
def test_the_runtime_shown_answers_as_shown(tmp_path: Path, serve: Serve) -> None:
    [source] = [block for block in BLOCKS if block.mark == f"{RUN} as a runtime"]
    [lines] = [block for block in SHELL if block.mark.endswith("which run these lines with the runtime above")]
    (tmp_path / "times.py").write_text(source.text)
    (tmp_path / "seven.txt").write_text("7")
    commands = list(lines.commands)
    runtime = subprocess.Popen([sys.executable, *commands[0][1:]], cwd=tmp_path, env=environment())
    try:
        instance = serve(None, "--runtime", f"unix:{tmp_path / 'times.sock'}")
        told = environment(MMCORE_TARGET=instance.grpc)
        for words in commands[2:]:
            text = shlex.join(words).replace("'$PWD", f"'{tmp_path}")
            argv = ["bash", "-c", text]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=told, check=False)
            assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["outputs"][0]["data"] == [7, 14, 21]
    finally:
        runtime.kill()
        runtime.wait(10)


@pytest.mark.slow
def test_first_inference_of_make_run_prints_its_answer_and_ends_with_0(samples: Path) -> None:
    ports = {"MMCORE_GRPC_PORT": "0", "MMCORE_REST_PORT": "0", "MMCORE_METRICS_PORT": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "deploy/samples/first_inference.py", samples, "--once"],
        capture_output=True, text=True, check=False, env=os.environ | ports, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"predict = \[\[?0", done.stdout)


# What is looked at.


def check_mmcore(words: list[str]) -> None:
    """Its commands and options are there, and values are such; files need not be."""
    command: click.Command = group
    context = click.Context(group, info_name="mmcore")
    args = words[1:]
    while isinstance(command, click.Group) and args and (found := command.get_command(context, args[0])) is not None:
        command, args = found, args[1:]
    assert command is not group, words
    context = click.Context(command)
    values, rest, _ = command.make_parser(context).parse_args(args=args)
    assert not rest, words
    for param in command.params:
        value = values.get(param.name or "")
        if value and isinstance(value, str) and not isinstance(param.type, click.Path | click.File):
            # Files are examples; the types of some options read them.
            param.type_cast_value(context, [value] if param.multiple else value)
        # What was not given is a mark of click's.
        given = isinstance(value, str | list | tuple)
        assert given or not param.required or isinstance(param, click.Option), words


def check_kubectl(words: list[str]) -> None:
    """What it is to apply is in the repository."""
    assert words[1] in ("apply", "get", "logs", "port-forward", "create", "rollout"), words
    for flag, value in itertools.pairwise(words):
        if flag in ("-k", "-f"):
            assert (ROOT / value).exists(), words


def check_grpcurl(words: list[str]) -> None:
    """Its method is served."""
    assert words[-1] == "list" or words[-1] in grpc_methods(), words


def grpc_methods() -> set[str]:
    """Full names of all methods of our contracts."""
    found = set()
    for encoded in pb.descriptor_protos():
        file = descriptor_pb2.FileDescriptorProto.FromString(encoded)
        for service in file.service:
            found |= {f"{file.package}.{service.name}/{method.name}" for method in service.method}
    return found


def check_curl(words: list[str]) -> None:
    """The path is served."""
    [url] = [word for word in words if word.startswith(REST_ADDRESS)]
    path = url.partition("/")[2]
    assert any(re.fullmatch(re.escape(route).replace(r"\*", "[^/]+"), path) for route, _ in ROUTES), words


def check_pip(words: list[str]) -> None:
    """Extras are those of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[1] == "install"
    for word in words[2:]:
        match = re.fullmatch(r"(?:\.|mmcore)\[(.*)\]", word)
        assert match is not None, words
        assert set(match[1].split(",")) <= set(project["optional-dependencies"]), words


def check_docker(words: list[str]) -> None:
    """The Dockerfile is there, and the context is the repository."""
    assert words[1] == "build" and words[-1] == ".", words
    assert (ROOT / words[words.index("-f") + 1]).is_file(), words


def check_helm(words: list[str]) -> None:
    """The chart is there and takes these values."""
    assert words[1] == "install" and (ROOT / words[3] / "Chart.yaml").is_file(), words
    stated = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    assert charted(helm_python.parse_set_string_values(",".join(stated))), words


def check_make(words: list[str]) -> None:
    """It is a verb."""
    assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), words


def check_python(words: list[str]) -> None:
    """The module or the file is there; of ``-m bench`` the suites too."""
    rest = words[1:]
    if rest[0] != "-m":
        shown = any(f"`{rest[0]}`" in text for text in PAGES.values())
        assert (ROOT / rest[0]).is_file() or shown, words
        return
    assert find_spec(rest[1]) is not None, words
    if rest[1] == "bench":
        assert set(itertools.takewhile(lambda word: word[0] != "-", rest[2:])) <= set(SUITES), words


CHECKS = {
    "make": check_make,
    "python": check_python,
    "docker": check_docker,
    "helm": check_helm,
    "mmcore": check_mmcore,
    "kubectl": check_kubectl,
    "grpcurl": check_grpcurl,
    "curl": check_curl,
    "pip": check_pip,
}


@pytest.mark.parametrize("block", [block for block in SHELL if block.mark.startswith(CHECKED)], ids=named)
def test_commands_that_are_not_run_are_such(block: Block) -> None:
    assert re.fullmatch(rf"{CHECKED}[:,] .+", block.mark), "say why it is not run"
    for words in block.commands:
        words = [*itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)]
        CHECKS[Path(words[0]).name](words)


@pytest.mark.parametrize(
    "command",
    [
        "mmcore serve --no-such", "mmcore nothing", "mmcore infer", "curl 127.0.0.1:8008/v3", "pip install .[x]",
        "helm install mmcore deploy/helm --set no.such=1", "docker build -f Dockerfile .",
    ],
)  # fmt: skip
def test_the_checks_find_what_is_wrong(command: str) -> None:
    with pytest.raises((AssertionError, click.UsageError, helm_python.HelmError)):
        CHECKS[command.split()[0]](command.split())


def test_each_shell_block_is_run_or_checked_or_is_a_verb_of_the_makefile() -> None:
    for block in SHELL:
        if block.mark not in (RUN, STARTED) and not block.mark.startswith(CHECKED):
            assert all(line.startswith("make ") for line in block.text.splitlines()), named(block)


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"`make ([a-z-]+)", "".join(PAGES.values())))))
def test_each_verb_shown_is_in_the_makefile(verb: str) -> None:
    assert re.search(rf"^{verb}:", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize("suite", sorted(set(re.findall(r"SUITE=([a-z0-9-]+)", "".join(PAGES.values())))))
def test_each_suite_shown_is_there(suite: str) -> None:
    assert suite in SUITES


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere_and_pages_are_short(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target
    assert len(PAGES[page].splitlines()) <= LONGEST_PAGE


def test_every_page_is_in_the_list_of_the_readme() -> None:
    assert set(re.findall(r"\]\((docs/[a-z-]+\.md)\)", PAGES["README.md"])) == set(PAGES) - {"README.md"}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "generated by" in text])
def test_generated_parts_are_current(page: str) -> None:
    assert reference.written(PAGES[page]) == PAGES[page], "run: python -m docs.reference"


def test_every_command_is_in_the_list_of_commands() -> None:
    rows = "".join(re.findall(r"^\| (`.*?) \|", PAGES["docs/cli.md"], re.MULTILINE))
    assert set(re.findall(r"`(?:mmcore )?([a-z]+)`", rows)) == set(COMMANDS)


def test_every_option_is_in_the_reference() -> None:
    listed = re.findall(r"^\| `(--[a-z-]+)", PAGES["docs/configuration.md"], re.MULTILINE)
    assert listed == [option.opts[0] for command in (serve_command, runtime_command) for option in command.params]


def test_list_of_compiled_modules_is_complete() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "ext/README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "ext").glob("*.pyx"))


def test_example_of_mmcore_yaml_has_every_key() -> None:
    [text] = [block.text for block in BLOCKS if block.mark.endswith("mmcore.yaml")]
    assert set(yaml.safe_load(text)) == set(settings._YAML_FIELDS)
