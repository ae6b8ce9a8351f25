"""The inputs of `mmcore infer` and `mmcore bench`, as they are typed and read from files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from mmcore.cli.inputs import Tensor, Wanted, image_layout, read_input


def read(text: str, known: dict[str, str], shape: tuple[int, ...] = ()) -> Tensor:
    return read_input(text, {name: Wanted(datatype, shape) for name, datatype in known.items()})


KNOWN = {"INPUT0": "INT32"}


@pytest.mark.parametrize(
    ("text", "known", "name", "datatype", "values"),
    [
        ("[[1, 2]]", KNOWN, "INPUT0", "INT32", [[1, 2]]),
        ("INPUT0=[1]", KNOWN, "INPUT0", "INT32", [1]),
        ("INPUT0:FP32=[1]", KNOWN, "INPUT0", "FP32", [1.0]),
        ("other=[1.5]", KNOWN, "other", "FP64", [1.5]),
        ("other=[1]", KNOWN, "other", "INT64", [1]),
        ("other=[true]", KNOWN, "other", "BOOL", [True]),
        ("3", KNOWN, "INPUT0", "INT32", [3]),
        ("text=hello=world", {}, "text", "BYTES", [b"hello=world"]),
        ('text=["a", "é"]', {"text": "BYTES"}, "text", "BYTES", [b"a", "é".encode()]),
        ("text=12", {"text": "BYTES"}, "text", "BYTES", [b"12"]),
        ("x=[]", {"x": "FP32"}, "x", "FP32", []),
    ],
)
def test_inputs_are_read(text: str, known: dict[str, str], name: str, datatype: str, values: list[Any]) -> None:
    got_name, got_datatype, array = read(text, known)
    assert (got_name, got_datatype, array.tolist()) == (name, datatype, values)


def test_inputs_come_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float64))
    (tmp_path / "x.json").write_text("[[1, 2, 3]]")
    known = {"x": "FP32"}
    assert read(f"x=@{tmp_path / 'x.npy'}", known)[2].dtype == np.float32
    assert read(f"@{tmp_path / 'x.json'}", known)[2].tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("text", "known", "words"),
    [
        ("[1]", {}, "NAME=DATA"),
        ("[1]", {"a": "FP32", "b": "FP32"}, "a, b"),
        ("a:FLOAT=[1]", {}, "FLOAT"),
        ("a=[1", {}, "a=\\[1|\\[1"),
        ("a=[[1], [2, 3]]", {}, "\\[1\\]"),
        ("a=@/no/such/file.json", {}, "no/such/file"),
        ('a=["x"]', {"a": "FP32"}, "not FP32"),
    ],
)
def test_wrong_inputs_are_usage_errors(text: str, known: dict[str, str], words: str) -> None:
    with pytest.raises(click.UsageError, match=words):
        read(text, known)


def test_a_file_of_no_known_kind_is_not_shown_whole(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(100_000))
    with pytest.raises(click.UsageError, match="--input x: not FP32") as refused:
        read(f"@{tmp_path / 'x.bin'}", {"x": "FP32"})
    assert len(str(refused.value)) < 300


# Files


@pytest.mark.parametrize(
    ("text", "datatype", "rows"),
    [
        ("1,2\n3,4.5\n", "FP32", [[1, 2], [3, 4.5]]),
        ("a,b\n1,2\n", "FP32", [[1, 2]]),
        ("1,2\r\n\r\n3,4", "INT64", [[1, 2], [3, 4]]),
        ('"a, b",c\n', "BYTES", [[b"a, b", b"c"]]),
        ("nan,inf\n", "FP64", [[np.nan, np.inf]]),
    ],
)
def test_csv_rows_become_rows(tmp_path: Path, text: str, datatype: str, rows: Any) -> None:
    (tmp_path / "x.csv").write_text(text)
    _, _, array = read(f"@{tmp_path / 'x.csv'}", {"x": datatype})
    assert array.shape == np.shape(rows)
    assert datatype == "BYTES" or np.array_equal(array, np.array(rows, array.dtype), equal_nan=True)
    assert datatype != "BYTES" or array.tolist() == rows


@pytest.mark.parametrize("text", ["", "1,2\n3\n", "1,2\na,b\n", "a,b\n"])
def test_csv_that_is_none_is_a_usage_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(click.UsageError, match=re.escape("x.csv")):
        read(f"@{tmp_path / 'x.csv'}", {"x": "FP32"})


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Four by two, red on the left and white on the right."""
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, :2, 0] = 255
    pixels[:, 2:] = 255
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize(
    ("datatype", "stated", "shape", "left"),
    [
        ("FP32", (-1, 3, 2, 4), (1, 3, 2, 4), [1, 0, 0]),
        ("FP32", (-1, 3, -1, -1), (1, 3, 2, 4), [1, 0, 0]),
        ("UINT8", (-1, 2, 4, 3), (1, 2, 4, 3), [255, 0, 0]),
        ("FP16", (3, 2, 4), (3, 2, 4), [1, 0, 0]),
        ("UINT8", (-1, 1, 8, 8), (1, 1, 8, 8), [76]),
        ("FP32", (-1, 4, 8, 3), (1, 4, 8, 3), [1, 0, 0]),
    ],
)
def test_images_fit_the_input(
    picture: Path, datatype: str, stated: tuple[int, ...], shape: tuple[int, ...], left: list[float]
) -> None:
    _, _, array = read(f"@{picture}", {"x": datatype}, stated)
    assert array.shape == shape
    first = image_layout(stated)[0]
    whole = array.reshape(shape[-3:])
    assert (whole[:, 0, 0] if first else whole[0, 0]).tolist() == left


def test_images_and_other_files_go_as_they_are_into_bytes(picture: Path) -> None:
    _, _, array = read(f"@{picture}", {"x": "BYTES"}, (-1, 1))
    assert (array.shape, array[0, 0]) == ((1, 1), picture.read_bytes())


def test_an_input_that_takes_no_image_says_so(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="takes no image"):
        read(f"@{picture}", {"x": "FP32"}, (-1, 4))
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(click.UsageError, match=r"no\.png"):
        read(f"@{tmp_path / 'no.png'}", {"x": "FP32"}, (-1, 3, 2, 2))
