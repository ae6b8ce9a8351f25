"""The schema that a model may come with: the names, datatypes and shapes of its tensors, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from mmcore.errors import InvalidModel

_SIDES: Final = ("inputs", "outputs")


def read_tensors(schema: Path) -> dict[str, list[dict[str, Any]]]:
    """``inputs`` and ``outputs``, each a list of ``name``, ``datatype`` and ``shape``; an absent side is left out.

    Raises:
        InvalidModel: it is no such JSON.
    """
    try:
        content = json.loads(schema.read_bytes())
        return {
            side: [
                {
                    "name": str(one["name"]),
                    "datatype": str(one["datatype"]),
                    "shape": [int(dim) for dim in one["shape"]],
                }
                for one in content[side]
            ]
            for side in _SIDES
            if content.get(side)
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModel(f"{schema.name} is no schema of tensors: {error}") from error
