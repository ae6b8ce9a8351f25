"""The input tensors of a request from what people type: JSON, text, and files of several kinds."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from mmcore.cli.connection import Connection
from mmcore.errors import RpcError, Status
from mmcore.model import NUMPY_DTYPES
from mmcore.pb import inference_pb2

Tensor = tuple[str, str, NDArray[Any]]


class Wanted(NamedTuple):
    """What a model says of one of its inputs; -1 is a free dimension."""

    datatype: str
    shape: tuple[int, ...] = ()


Known = Mapping[str, Wanted]

#: ``name=``, ``name:DATATYPE=`` or nothing before the value.
_INPUT: Final = re.compile(r"(?:(?P<name>[^=\[{\"@]*?)(?::(?P<datatype>[A-Z0-9]+))?=)?(?P<value>.*)", re.DOTALL)
_DATATYPES: Final = {"b": "BOOL", "i": "INT64", "u": "UINT64", "f": "FP64", "U": "BYTES", "S": "BYTES", "O": "BYTES"}
IMAGES: Final = frozenset({".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"})
_GREY, _COLOUR = 1, 3
_ERROR_CHARACTERS: Final = 160


async def known_inputs(connection: Connection, model: str, version: str) -> Known:
    """The model's inputs; none where its runtime does not tell.

    Raises:
        RpcError: the model cannot be asked for.
    """
    request = inference_pb2.ModelMetadataRequest(name=model, version=version)
    try:
        metadata = await connection.call("ModelMetadata", request, inference_pb2.ModelMetadataResponse)
    except RpcError as error:
        if error.status is not Status.UNIMPLEMENTED:
            raise
        return {}
    return {one.name: Wanted(one.datatype, tuple(one.shape)) for one in metadata.inputs}


def read_input(text: str, known: Known) -> Tensor:
    """One ``--input`` as name, datatype and array; ``known`` are the model's inputs.

    Raises:
        click.UsageError: no name where one is needed, an unknown datatype, or a value that is none.
        click.ClickException: a file that cannot be read.
    """
    match = _INPUT.fullmatch(text)
    assert match is not None  # every part is optional
    name, datatype, value = match["name"] or "", match["datatype"] or "", match["value"]
    if not name:
        if len(known) != 1:
            raise click.UsageError(
                f"--input needs a name; the model's inputs are {', '.join(known) or 'unknown'} (write NAME=DATA)"
            )
        name = next(iter(known))
    wanted = known.get(name, Wanted(""))
    datatype = datatype or wanted.datatype
    try:
        array = _from_file(Path(value[1:]), datatype, wanted.shape) if value.startswith("@") else _from_text(value)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--input {text}: {error}") from None
    datatype = datatype or _DATATYPES.get(array.dtype.kind, "")
    if datatype not in NUMPY_DTYPES:
        raise click.UsageError(
            f"--input {name}: {datatype or array.dtype} is no datatype; known are {', '.join(NUMPY_DTYPES)}"
        )
    return name, datatype, _typed(array, name, datatype)


def _typed(array: NDArray[Any], name: str, datatype: str) -> NDArray[Any]:
    try:
        if datatype == "BYTES":
            flat = [one if isinstance(one, bytes) else str(one).encode() for one in array.ravel().tolist()]
            return np.array([*flat, None], dtype=object)[:-1].reshape(array.shape)
        return np.asarray(array, dtype=NUMPY_DTYPES[datatype])
    except (TypeError, ValueError) as error:
        # A file that is none of the known kinds is one element, which the error would show whole.
        raise click.UsageError(f"--input {name}: not {datatype}: {str(error)[:_ERROR_CHARACTERS]}") from None


def _from_text(text: str) -> NDArray[Any]:
    if text[:1] in {"[", "{", '"'}:
        return np.array(json.loads(text))
    try:
        return np.array([json.loads(text)])
    except ValueError:
        return np.array([text])


def _from_file(file: Path, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """What a file holds; by its ending JSON, NumPy's format, CSV or an image, otherwise its bytes as one element.

    Raises:
        OSError, ValueError: it cannot be read, or is not what its name says.
    """
    kind = file.suffix.lower()
    if kind in IMAGES and datatype != "BYTES":
        return read_image(file, datatype, shape)
    if kind == ".npy":
        array: NDArray[Any] = np.load(file, allow_pickle=False)
        return array
    if kind == ".csv":
        return _read_csv(file, datatype)
    if kind == ".json":
        return np.array(json.loads(file.read_text()))
    one = np.empty((1,) * max(1, len(shape)), dtype=object)
    one[...] = file.read_bytes()
    return one


def _read_csv(file: Path, datatype: str) -> NDArray[Any]:
    """The rows; a first one that is no numbers, where the others are, is their titles."""
    with file.open(newline="") as lines:
        rows = [row for row in csv.reader(lines) if row]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("expected rows of the same length")
    if datatype == "BYTES":
        return np.array(rows)
    if len(rows) > 1 and not _numbers(rows[0]):
        rows = rows[1:]
    return np.array([[float(value) for value in row] for row in rows])


def _numbers(row: list[str]) -> bool:
    try:
        return bool([float(value) for value in row])
    except ValueError:
        return False


def read_image(file: Path, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """An image as one tensor of ``shape``, whose last or third last dimension is the channels, 1 or 3.

    It is brought to the shape's height and width where those are stated. Datatypes of floating point get values from
    0 to 1, others from 0 to 255.

    Raises:
        OSError, ValueError: it is no image, or the shape is none of one.
        click.ClickException: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise click.ClickException("images need Pillow; install it with: pip install 'mmcore[images]'") from None
    first, channels, size, batched = image_layout(shape)
    with Image.open(file) as opened:
        image = opened.convert("L" if channels == _GREY else "RGB")
        width, height = (wanted if wanted > 0 else got for wanted, got in zip(size, image.size, strict=True))
        array = np.asarray(image.resize((width, height)))
    array = array.reshape(height, width, channels)
    array = array.transpose(2, 0, 1) if first else array
    if datatype.startswith(("FP", "BF")):
        array = array.astype(np.float32) / 255
    return array[np.newaxis] if batched else array


def image_layout(shape: tuple[int, ...]) -> tuple[bool, int, tuple[int, int], bool]:
    """How a tensor holds an image: channels first, how many, width and height, and whether a batch is in front.

    Raises:
        ValueError: it holds none.
    """
    inner = shape[-3:]
    if len(shape) in (3, 4):
        if inner[2] in (_GREY, _COLOUR):
            return False, inner[2], (inner[1], inner[0]), len(shape) == 4
        if inner[0] in (_GREY, _COLOUR):
            return True, inner[0], (inner[2], inner[1]), len(shape) == 4
    raise ValueError(f"an input of shape {list(shape)} takes no image: expected [N,] C, H, W or [N,] H, W, C")
