"""Models loaded with a configuration, or files, that came with the request (Triton, model repository extension)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from mmcore.errors import InvalidModel, InvalidRequest
from mmcore.storage import FileOrigin
from mmcore.storage.config_pbtxt import read_config_json
from mmcore.storage.containment import inside
from mmcore.storage.stated import Stated

_PREFIX: Final = "file:"


def override_origin(name: str, folder: Path | None, config_json: str | None, files: Mapping[str, bytes]) -> FileOrigin:
    """The origin of a model that a load request describes: its ``files``, or else ``folder``, with its configuration.

    The files' names are paths in a model folder (``1/model.onnx``), a leading ``file:`` is dropped; they are written
    to a private folder that the origin owns. Blocking.

    Raises:
        InvalidRequest: files without a configuration, names that leave the folder, or nothing to load from.
    """
    override: Callable[[Path], Stated] | None = None
    if config_json is not None:
        override = partial(read_config_json, config_json)
    if not files:
        if folder is None:
            raise InvalidRequest(f"failed to load '{name}', failed to poll from model repository")
        return FileOrigin(name, folder, override=override)
    if override is None:
        raise InvalidRequest(f"failed to load '{name}', override model directory with files needs parameter 'config'")
    private = Path(tempfile.mkdtemp(prefix="mmcore-"))
    origin = FileOrigin(name, private, override=override, owned=True)
    try:
        for stated, content in files.items():
            path = inside(private, stated.removeprefix(_PREFIX), "file")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except (InvalidModel, OSError) as error:
        origin.close()
        raise InvalidRequest(f"failed to load '{name}', {error}") from error
    except BaseException:
        origin.close()
        raise
    return origin
