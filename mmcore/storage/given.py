"""Files that somebody else has pulled: a mesh tells a runtime where they are."""

from __future__ import annotations

from pathlib import Path

from mmcore.errors import InvalidRequest, LoadFailed
from mmcore.model import ModelInfo
from mmcore.storage.cancellation import Cancellation
from mmcore.storage.places import ModelKey
from mmcore.storage.puller import Pulled


class GivenFiles:
    """Satisfies :class:`mmcore.storage.puller.Pulls`: a model's path is that of its files on this machine."""

    def pull(self, info: ModelInfo, *, cancelled: Cancellation | None = None) -> Pulled:
        """The files where they are, and the schema that the key names: at once, whoever waits.

        Raises:
            InvalidRequest: a path is not absolute.
            LoadFailed: there is nothing at it.
        """
        schema = ModelKey.read(info.key).schema_path
        return Pulled(_there(info.path), _there(schema) if schema else None)


def _there(stated: str) -> Path:
    path = Path(stated)
    if not path.is_absolute():
        raise InvalidRequest(f"the path must be an absolute one of files on this machine, got {stated!r}")
    if not path.exists():
        raise LoadFailed(f"{path} does not exist")
    return path
