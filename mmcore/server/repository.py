"""The model repository extension, and what is asked about single models: readiness, metadata, configuration.

A model that is registered and not loaded counts as ready, since a request would be answered: the first one loads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from mmcore.cache import CopyState
from mmcore.errors import InvalidRequest, LoadFailed, NotFound
from mmcore.pb import inference_pb2
from mmcore.routing import Router
from mmcore.server.model_config import model_config, model_metadata

_CONFIG: Final = "config"
_FILE_PREFIX: Final = "file:"
_READY: Final = "READY"
#: Models listed between two looks at the loop's other work.
_AT_ONCE: Final = 500


class Repository:
    """Answers what clients ask and tell about models."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def model_ready(self, request: inference_pb2.ModelReadyRequest) -> inference_pb2.ModelReadyResponse:
        """Whether a request would be answered by this version; an unknown one is not ready, which is no error."""
        return inference_pb2.ModelReadyResponse(ready=self._is_ready(request.name, request.version))

    def _is_ready(self, name: str, version: str) -> bool:
        try:
            self._router.check(name, version)
        except NotFound:
            return False
        versions = self._router.versions(name)
        if any(version in ("", copy.version) for copy in self._router.copies(name)):
            return True
        asked = version or (versions[-1] if versions else "")
        return asked in versions and self._router.cache.state(name, asked) is not CopyState.FAILED

    async def model_metadata(self, request: inference_pb2.ModelMetadataRequest) -> inference_pb2.ModelMetadataResponse:
        """Names, datatypes and shapes of a model's tensors; loads it if need be. Errors as for inference."""
        copy = await self._router.load(request.name, request.version)
        return model_metadata(copy.name, self._router.versions(copy.name), copy.model)

    async def model_config(self, request: inference_pb2.ModelConfigRequest) -> inference_pb2.ModelConfigResponse:
        """Its configuration; loads it if need be. Errors as for inference."""
        copy = await self._router.load(request.name, request.version)
        lane = self._router.execution.lane(copy)
        most_rows = lane.merging.most_rows if lane.merging is not None and lane.merges else 0
        config = model_config(copy.name, copy.model, copy.source.settings, copy.source.path.name, merged=most_rows)
        return inference_pb2.ModelConfigResponse(config=config)

    async def index(self, request: inference_pb2.RepositoryIndexRequest) -> inference_pb2.RepositoryIndexResponse:
        """Every version of every model with its state, or those that are loaded.

        Raises:
            InvalidRequest: a repository was named; there is only one.
        """
        _refuse_repository(request.repository_name)
        response = inference_pb2.RepositoryIndexResponse()
        for number, name in enumerate(self._router.names()):
            for row in self._router.rows(name):
                if row.state == _READY or not request.ready:
                    response.models.add(name=row.name, version=row.version, state=row.state, reason=row.reason)
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return response

    async def load(
        self, request: inference_pb2.RepositoryModelLoadRequest
    ) -> inference_pb2.RepositoryModelLoadResponse:
        """Load a model from its folder as it is now, or with the configuration and files that come with the request.

        Raises:
            InvalidRequest: a parameter is unknown, of the wrong kind, or names a file outside a model's folder.
            NotFound: there is no such model.
            LoadFailed: it was not loaded; what served before still does.
        """
        _refuse_repository(request.repository_name)
        name = request.model_name
        config, files = _overrides(request.parameters)
        try:
            if config is None and not files:
                await self._router.load_explicit(name)
            else:
                await self._router.load_override(name, config, files)
        except LoadFailed as error:
            # Triton's clients look for these words.
            prefix = f"failed to load '{name}', "
            raise type(error)(prefix + str(error).removeprefix(prefix)) from error
        return inference_pb2.RepositoryModelLoadResponse()

    async def unload(
        self, request: inference_pb2.RepositoryModelUnloadRequest
    ) -> inference_pb2.RepositoryModelUnloadResponse:
        """Take a model out of service. ``unload_dependents`` is taken too: no model depends on another here.

        Raises:
            NotFound: there is no such model.
        """
        _refuse_repository(request.repository_name)
        await self._router.unload(request.model_name)
        return inference_pb2.RepositoryModelUnloadResponse()


def _refuse_repository(name: str) -> None:
    if name:
        raise InvalidRequest(f"'repository_name' specification is not supported, got '{name}'")


def _overrides(
    parameters: Mapping[str, inference_pb2.ModelRepositoryParameter],
) -> tuple[str | None, dict[str, bytes]]:
    """The configuration and the files by name in a load request's parameters."""
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if key == _CONFIG:
            if kind != "string_param":
                raise InvalidRequest(f"load parameter '{key}' takes a string_param, got {kind or 'nothing'}")
            config = parameter.string_param
        elif key.startswith(_FILE_PREFIX):
            if kind != "bytes_param":
                raise InvalidRequest(f"load parameter '{key}' takes a bytes_param, got {kind or 'nothing'}")
            files[key.removeprefix(_FILE_PREFIX)] = parameter.bytes_param
        else:
            raise InvalidRequest(f"unknown load parameter '{key}'; known are {_CONFIG} and {_FILE_PREFIX}PATH")
    return config, files
