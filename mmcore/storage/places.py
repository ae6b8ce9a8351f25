"""Where a registered model's files are: entries of a folder of JSON files, a model's own parameters over them, URIs.

The forms are those of the archived stack: one file for each storage key, as the secret ``storage-config`` is mounted,
and the JSON of a model's key. Entries hold credentials: no error text, log line or repr shows a value of theirs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from mmcore.errors import LoadFailed
from mmcore.model import ModelInfo
from mmcore.storage.stated import known_format

#: What a key of a Kubernetes secret may be called.
_ENTRY: Final = re.compile(r"[-._a-zA-Z0-9]+")
_AZURE_HOST: Final = ".blob.core.windows.net"
#: In an entry: that this machine's own identity is used; and what says which, and where its tokens are sent.
_IDENTITY: Final = "credentials"
_RECEIVERS: Final = ("account_name", "authority_host", "certificate", "client_id", "endpoint_url", "tenant_id", "type")
_URI: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """One model's files at one provider.

    Attributes:
        type: the provider: ``s3``, ``gcs``, ``azure``, ``http``, ``pvc`` or ``local``.
        path: the file or folder there.
        schema_path: a file there that describes the model's tensors; None when there is none.
        parameters: how the provider is reached, credentials included.
    """

    type: str
    path: str
    schema_path: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict, repr=False)

    def text(self, name: str) -> str | None:
        """A parameter that is a text, None when absent or empty.

        Raises:
            LoadFailed: it is something else.
        """
        value = self.parameters.get(name)
        if value is not None and not isinstance(value, str):
            raise LoadFailed(f"storage of type {self.type}: '{name}' must be a text")
        return value or None

    def required(self, name: str) -> str:
        """A parameter that must be there.

        Raises:
            LoadFailed: it is not.
        """
        value = self.text(name)
        if value is None:
            raise LoadFailed(f"storage of type {self.type} needs '{name}'; it is neither in the entry nor a parameter")
        return value

    def flag(self, name: str) -> bool:
        """A parameter that is true or false, as JSON or as a text; false when absent."""
        value = self.parameters.get(name, False)
        if isinstance(value, bool):
            return value
        if not isinstance(value, str) or value.lower() not in ("true", "false", ""):
            raise LoadFailed(f"storage of type {self.type}: '{name}' must be true or false")
        return value.lower() == "true"


@dataclass(frozen=True, slots=True)
class ModelKey:
    """What the JSON of a model's key says."""

    storage_key: str | None = None
    storage_params: dict[str, Any] = field(default_factory=dict, repr=False)
    model_type: str | None = None
    schema_path: str | None = None
    bucket: str | None = None

    @classmethod
    def read(cls, text: str) -> ModelKey:
        """Read the key; unknown fields are passed over.

        Raises:
            LoadFailed: it is no JSON object, or a field is of the wrong kind.
        """
        try:
            values = json.loads(text or "{}")
        except (ValueError, RecursionError):
            raise LoadFailed("the model's key is not JSON") from None
        if not isinstance(values, dict):
            raise LoadFailed("the model's key is not a JSON object")
        stated_type = values.get("model_type")
        if isinstance(stated_type, dict):
            stated_type = stated_type.get("name")
        params = values.get("storage_params") or {}
        if not isinstance(params, dict):
            raise LoadFailed("the model's key: 'storage_params' must be an object")
        texts = {name: values.get(name) for name in ("storage_key", "schema_path", "bucket")}
        for name, value in {**texts, "model_type": stated_type}.items():
            if value is not None and not isinstance(value, str):
                raise LoadFailed(f"the model's key: '{name}' must be a text")
        return cls(storage_params=params, model_type=stated_type or None, **{k: v or None for k, v in texts.items()})


def stated_format(info: ModelInfo) -> str | None:
    """Our name of the format that a model is registered with; None when only its files can tell.

    The key's ``model_type`` goes before the type, versions and protocols behind the format are not looked at, and a
    label ``rt:RUNTIME`` names no format.
    """
    label = ModelKey.read(info.key).model_type or info.type.partition("|")[0]
    if label.startswith("rt:"):
        return None
    return known_format(label.removeprefix("mt:")) or None


def parse_uri(uri: str) -> tuple[dict[str, str], str]:
    """A ``storageUri`` as parameters, their ``type`` included, and the path.

    Raises:
        LoadFailed: the scheme is not known, or the bucket, container or name is missing.
    """
    parts = urlsplit(uri)
    path = unquote(parts.path).removeprefix("/")
    host = parts.hostname or ""
    if parts.scheme in ("http", "https"):
        if host.endswith(_AZURE_HOST):
            container, _, path = path.partition("/")
            values = {"type": "azure", "account_name": host.removesuffix(_AZURE_HOST), "container": container}
        else:
            query = f"?{parts.query}" if parts.query else ""
            values = {"type": "http", "url": f"{parts.scheme}://{parts.netloc}{query}"}
    elif parts.scheme in ("s3", "gs"):
        values = {"type": "s3" if parts.scheme == "s3" else "gcs", "bucket": parts.netloc}
    elif parts.scheme == "pvc":
        values = {"type": "pvc", "name": parts.netloc}
    elif parts.scheme == "file" and not parts.netloc:
        return {"type": "local"}, "/" + path
    else:
        raise LoadFailed(
            f"the scheme '{parts.scheme}://' is not known; these are: s3://, gs://, https://, http://, pvc://, file://"
        )
    if not all(values.values()) or not parts.netloc:
        raise LoadFailed(f"{parts.scheme}:// needs a bucket, container, host or claim name before the path")
    return values, path


class StorageConfig:
    """The storage entries in ``folder``, one JSON file each; none without a folder.

    A file is read each time it is needed, so a change holds from the next pull on, also where Kubernetes switches the
    link that the whole folder hangs on. ``own_parameters`` says that parameters are of somebody whose identity this
    process has; those of others neither take it nor say where its tokens are sent.
    """

    def __init__(self, folder: Path | None = None, *, own_parameters: bool = False) -> None:
        self._folder = folder
        self._own_parameters = own_parameters

    def names(self) -> list[str]:
        """The keys of all entries."""
        if self._folder is None:
            return []
        try:
            return sorted(one.name for one in self._folder.iterdir() if one.is_file() and one.name[:1] != ".")
        except OSError as error:
            raise LoadFailed(f"the folder of storage entries {self._folder} cannot be read: {error.strerror}") from None

    def place(self, info: ModelInfo) -> Place:
        """Where the model's files are by the entries as they are now.

        A model whose key names no entry takes ``default_TYPE`` if its parameters state a type, else ``default``, where
        there is such an entry. A path may be a URI, whose parts go before the model's parameters.

        Raises:
            LoadFailed: the entry is missing or wrong, or nothing tells the type of the storage.
        """
        key = ModelKey.read(info.key)
        params, path = dict(key.storage_params), info.path
        if _URI.match(path):
            stated, path = parse_uri(path)
            params.update(stated)
        if key.storage_key is not None:
            entry = self._entry(key.storage_key)
            if entry is None:
                known = ", ".join(self.names()) or "none"
                raise LoadFailed(f"there is no storage entry '{key.storage_key}'; known are: {known}")
        else:
            stated_type = params.get("type")
            entry = self._entry(f"default_{stated_type}" if stated_type else "default") or {}
        if not self._own_parameters:
            _check_identity(entry, params)
        _lay_over(entry, params)
        if key.bucket and "bucket" in entry:
            entry["bucket"] = key.bucket
        if "type" not in entry and path.startswith("/"):
            entry["type"] = "local"
        kind = entry.pop("type", None)
        if not isinstance(kind, str) or not kind:
            raise LoadFailed(
                "nothing tells where the model's files are: its key has no storage_key and no 'type' in storage_params,"
                " and there is no storage entry 'default'"
            )
        return Place(kind, path, key.schema_path, entry)

    def _entry(self, name: str) -> dict[str, Any] | None:
        if self._folder is None:
            return None
        if not _ENTRY.fullmatch(name) or name.startswith("."):
            raise LoadFailed(f"'{name}' cannot be the name of a storage entry")
        try:
            values = json.loads((self._folder / name).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LoadFailed(f"the storage entry '{name}' cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            # The error's own text would show a piece of the entry.
            raise LoadFailed(f"the storage entry '{name}' is not JSON") from None
        if not isinstance(values, dict):
            raise LoadFailed(f"the storage entry '{name}' is not a JSON object")
        return values


def _check_identity(entry: dict[str, Any], params: dict[str, Any]) -> None:
    """Whoever may register a model could have this machine's tokens sent to a server of theirs otherwise."""
    if _IDENTITY in params:
        raise LoadFailed(f"'{_IDENTITY}' can be said in a storage entry alone, not by a model's parameters")
    for name in _RECEIVERS if _IDENTITY in entry else ():
        if name in params and params[name] != entry.get(name):
            raise LoadFailed(
                f"the storage parameter '{name}' cannot be changed by a model: the entry uses this machine's identity"
            )


def _lay_over(entry: dict[str, Any], params: dict[str, Any]) -> None:
    """Put each parameter in its place; dots in its name lead into objects, and only texts are replaced."""
    for name, value in params.items():
        if not isinstance(value, str):
            raise LoadFailed(f"the storage parameter '{name}' must be a text")
        *parents, last = name.split(".")
        at = entry
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise LoadFailed(f"the storage parameter '{name}': '{parent}' is no object in the entry")
        if not isinstance(at.get(last, ""), str):
            raise LoadFailed(f"the storage parameter '{name}' would replace what is no text in the entry")
        at[last] = value
