"""What README.md shows is true: its commands run, its tables list what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml

from mmcore.cli.serve import command as serve
from mmcore.storage import settings
from tests.serving import Instance, Serve

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
#: The addresses of the examples, where the fixture's server has other ports.
ADDRESS = "127.0.0.1:8033"
REST_ADDRESS = "127.0.0.1:8008"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the comment on the line before it."""

    language: str
    text: str
    mark: str


BLOCKS = [
    Block(match["language"], match["text"], match["mark"] or "")
    for match in re.finditer(
        r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", README, re.DOTALL | re.MULTILINE
    )
]
RUN = [block for block in BLOCKS if block.mark == "run by the tests"]


SERVED = "served by the tests as "


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample models of ``make run``, and the model that the README shows."""
    folder = tmp_path_factory.mktemp("samples")
    subprocess.run([sys.executable, ROOT / "deploy/samples/train.py", folder], check=True, capture_output=True)
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


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=lambda block: block.text.split("\n", 1)[0])
def test_example_runs_as_shown(block: Block, instance: Instance) -> None:
    text = block.text.replace(ADDRESS, instance.grpc).replace(REST_ADDRESS, instance.rest)
    argv = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euc", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MMCORE_TARGET": instance.grpc}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"iris-sklearn|predict|celsius|\[\[0", done.stdout)


@pytest.mark.slow
def test_first_inference_of_make_run_prints_its_answer_and_ends_with_0(samples: Path) -> None:
    ports = {"MMCORE_GRPC_PORT": "0", "MMCORE_REST_PORT": "0", "MMCORE_METRICS_PORT": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "deploy/samples/first_inference.py", samples, "--once"],
        capture_output=True, text=True, check=False, env=os.environ | ports,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"predict = \[\[?0", done.stdout)


def test_each_shell_block_is_run_or_says_why_not_or_is_a_verb_of_the_makefile() -> None:
    for block in BLOCKS:
        if block.language == "sh" and block not in RUN and not block.mark.startswith("not run by the tests: "):
            assert all(line.startswith("make ") for line in block.text.splitlines()), block.text


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"`make ([a-z-]+)", README))))
def test_each_verb_shown_is_in_the_makefile(verb: str) -> None:
    assert re.search(rf"^{verb}:", MAKEFILE, re.MULTILINE)


def default_shown(option: click.Option) -> str:
    """An option's default as the table writes it."""
    if isinstance(option.show_default, str):
        return option.show_default
    default = option.get_default(click.Context(serve))
    if not isinstance(default, int | str):
        return "none"
    return f"{int(default) >> 20} MiB" if option.name == "max_message" else str(default)


def test_configuration_table_lists_the_options_of_serve_and_their_defaults() -> None:
    table = re.findall(r"^\| `(--[a-z-]+)[^`]*` \| `(MMCORE_[A-Z_]+)` \| `?(.*?)`? \|", README, re.MULTILINE)
    options = [option for option in serve.params if isinstance(option, click.Option)]
    assert table == [(option.opts[0], option.envvar, default_shown(option)) for option in options]


def test_list_of_compiled_modules_is_complete() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "ext/README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "ext").glob("*.pyx"))


def test_example_of_mmcore_yaml_has_every_key() -> None:
    [text] = [block.text for block in BLOCKS if block.mark.endswith("mmcore.yaml")]
    assert set(yaml.safe_load(text)) == set(settings._YAML_FIELDS)
