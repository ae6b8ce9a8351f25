"""Has each Predictor and InferenceService registered with its namespace's instances, and tells how it is doing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from mmcore.controller import notices, pods
from mmcore.controller.api import Api, ApiError
from mmcore.controller.deployment import deployment_name, pod_selector
from mmcore.controller.events import Events
from mmcore.controller.informer import Informer
from mmcore.controller.known import Known, Selected
from mmcore.controller.mesh import Mesh, NoInstance
from mmcore.controller.mesh_manifests import endpoints
from mmcore.controller.objects import (
    FINALIZER,
    INFERENCE_SERVICE,
    PREDICTOR,
    Kind,
    Object,
    Ref,
    at,
    covers,
    deleting,
    labels_of,
    ref,
)
from mmcore.controller.runtimes import Runtime, problems
from mmcore.controller.statuses import (
    FAILED,
    INVALID,
    PENDING,
    UNHEALTHY,
    Failure,
    ModelStatus,
    inference_service_status,
    observe,
    predictor_status,
    read_inference_service,
    read_predictor,
    unreachable,
)
from mmcore.controller.wanted import INFERENCE_SERVICE_OWNER, PREDICTOR_OWNER, WantedModel, is_served
from mmcore.errors import RpcError, Status
from mmcore.pb import model_mesh_pb2 as pb

#: A model whose load failed is asked for again after this, as the archived release did.
_RETRY_FAILED_S: Final = 600.0
#: How long a deletion waits for an instance to be told.
_LEAVE_WITHIN_S: Final = 60.0
_LOOK_AGAIN_S: Final = 3.0
#: How long and how often failed loads are tried again when a namespace's secret of stores has changed: the kubelet
#: brings it to the pods within that time.
_SOON_FOR_S: Final = 120.0
_SOON_EVERY_S: Final = 5.0
#: Stands between a model's name and the time of a further try.
_TRY: Final = "--"
_ANOTHER_TRY: Final = "another try"


@dataclass(frozen=True, slots=True)
class Source:
    """One of the two kinds of object: who owns their vmodels, and how their status is read and written."""

    kind: Kind
    owner: str
    read: Callable[[Object], ModelStatus]
    write: Callable[[Object, ModelStatus, datetime], Object]


SOURCES: Final = (
    Source(PREDICTOR, PREDICTOR_OWNER, read_predictor, predictor_status),
    Source(INFERENCE_SERVICE, INFERENCE_SERVICE_OWNER, read_inference_service, inference_service_status),
)


class ModelReconciler:
    """Works on one object at a time; ``meshes`` gives the instances of a namespace."""

    def __init__(self, api: Api, known: Known, meshes: Callable[[str], Mesh], events: Events) -> None:
        self._api = api
        self._known = known
        self._meshes = meshes
        self._events = events
        self._informers = {PREDICTOR.name: known.predictors, INFERENCE_SERVICE.name: known.inference_services}
        #: The model that an object's instances were last asked to load, and when.
        self._asked: dict[tuple[str, Ref], tuple[str, float]] = {}
        #: How often they have been asked for it in vain. Many loads at once take all the room that there may be, by
        #: what they are expected to need, and further ones are let drop; a while later there is room.
        self._tries: dict[tuple[str, Ref], int] = {}
        #: Until when failed loads of a namespace are tried again soon: its stores have changed.
        self._soon_until: dict[str, float] = {}

    def retry_soon(self, namespace: str) -> None:
        """Have failed loads of a namespace tried again: what they failed of may have been mended."""
        self._soon_until[namespace] = asyncio.get_running_loop().time() + _SOON_FOR_S

    async def reconcile(self, source: Source, where: Ref) -> float | None:
        """Bring one object to where it is to be; the seconds after which to look again."""
        informer = self._informers[source.kind.name]
        item = informer.items.get(where)
        if item is None:
            return None
        mine = FINALIZER in (item["metadata"].get("finalizers") or [])
        served = source.kind is PREDICTOR or is_served(item)
        if deleting(item) or not served or not self._known.enabled(where.namespace):
            return await self._leave(source, informer, item) if mine else None
        if not mine:
            item = await self._hold(informer, source.kind, item)
        status, again = await self._bring(source, item)
        if status is not None:
            await self._write(source, informer, item, self._with_endpoints(status, where.namespace))
        return again

    async def _bring(self, source: Source, item: Object) -> tuple[ModelStatus | None, float | None]:
        """Register what the object asks for; its status, None to leave it, and when to look again."""
        namespace, name = item["metadata"]["namespace"], item["metadata"]["name"]
        before, mesh = source.read(item), self._meshes(namespace)
        chosen = self._known.selected(source.kind, item)
        refused = self._known.refusal(namespace, chosen.runtime.name) if isinstance(chosen.runtime, Runtime) else ""
        problem, ready = self._problem(namespace, chosen, refused)
        if not mesh.reachable:
            return _unreached(before, problem, refused), None
        if not mesh.listed:
            return None, _LOOK_AGAIN_S
        vmodel = self._vmodel(mesh, name)
        if vmodel is not None and vmodel.owner != source.owner:
            return observe(None, "", before, _clash()), _RETRY_FAILED_S
        wanted = ""
        if chosen.model is not None and isinstance(chosen.runtime, Runtime):
            model_id = wanted = chosen.model.model_id(chosen.runtime.label)
            if vmodel is not None and vmodel.targetModelId.startswith(model_id + _TRY):
                wanted = vmodel.targetModelId
            target = self._to_ask_for(source, item, vmodel, wanted, ready)
            if target == _ANOTHER_TRY:
                target = f"{model_id}{_TRY}{int(datetime.now(UTC).timestamp())}"
            if target:
                wanted = target
                request = _request(chosen.model, target, chosen.runtime.label, load_now=ready)
                try:
                    vmodel = await mesh.set_vmodel(request)
                except NoInstance as error:
                    return unreachable(before, str(error)), _LOOK_AGAIN_S
                except RpcError as error:
                    if error.status is not Status.ALREADY_EXISTS:
                        raise
                    return observe(None, "", before, _clash()), _RETRY_FAILED_S
        status = _with_refused(observe(vmodel, wanted, before, problem), refused)
        return status, self._again_s(source, item, status)

    def _problem(self, namespace: str, chosen: Selected, refused: str) -> tuple[Failure | None, bool]:
        """What stands against serving it, and whether its runtime has a ready pod.

        ``refused`` is what the API server does not take of what the runtime needs.
        """
        if chosen.invalid:
            return Failure(INVALID, chosen.invalid), False
        if not isinstance(chosen.runtime, Runtime):
            unfit = chosen.runtime
            assert unfit is not None
            return Failure(unfit.reason, unfit.message, unfit.detail), False
        config = self._known.config
        labels = pod_selector(config, chosen.runtime.name)
        of_runtime = [one for one in self._known.pods.of(namespace) if labels.items() <= labels_of(one).items()]
        if any(map(pods.is_ready, of_runtime)):
            return None, True
        found = self._known.deployments.get(namespace, deployment_name(config, chosen.runtime.name))
        message = refused or "Waiting for supporting runtime Pod to become available"
        wrong = "; ".join(problems(chosen.runtime, config))
        detail = f"the runtime '{chosen.runtime.name}': {wrong}" if wrong else pods.trouble(of_runtime, found)
        return Failure(UNHEALTHY, message, detail), False

    def _to_ask_for(
        self, source: Source, item: Object, vmodel: pb.VModelStatusInfo | None, wanted: str, ready: bool
    ) -> str:
        """The model that instances are to be asked for: another one, or one that never was or could not be loaded.

        Empty where nothing is to be asked, :data:`_ANOTHER_TRY` for the same by a new name.
        """
        where, now = ref(item), asyncio.get_running_loop().time()
        key = (source.kind.name, where)
        asked, at = self._asked.get(key, ("", 0.0))
        if vmodel is not None and vmodel.targetModelId == wanted:
            if not ready:
                return ""
            moves, active = vmodel.activeModelId != vmodel.targetModelId, source.read(item).active
            newest = (vmodel.targetModelStatus if moves else vmodel.activeModelStatus).status
            if newest != pb.ModelStatusInfo.NOT_LOADED:
                self._tries.pop(key, None)
            if newest == pb.ModelStatusInfo.LOADING_FAILED:
                pause = _RETRY_FAILED_S
                if now < self._soon_until.get(where.namespace, 0.0) and now - at > _SOON_EVERY_S:
                    # Instances remember the failure by the model's name, so it is given another one.
                    self._asked[key] = wanted, now
                    return _ANOTHER_TRY
            elif newest == pb.ModelStatusInfo.NOT_LOADED and (moves or active in (PENDING, "Loading", FAILED)):
                # Once is enough where the status tells the next time that it has been asked for.
                pause = _LOOK_AGAIN_S if moves or active == "Loading" else 0.0
            elif newest == pb.ModelStatusInfo.NOT_LOADED and asked == wanted and (tries := self._tries.get(key, 0)):
                pause = _pause_s(tries)
            else:
                # One that was loaded and let go is loaded by its next request.
                return ""
            if asked == wanted and now - at < pause:
                return ""
        if ready:
            self._asked[key] = wanted, now
            self._tries[key] = self._tries.get(key, 0) + 1
        return wanted

    def _again_s(self, source: Source, item: Object, status: ModelStatus) -> float | None:
        if FAILED in (status.active, status.target):
            return self._retry_s(item["metadata"]["namespace"])
        tries = self._tries.get((source.kind.name, ref(item)))
        return _pause_s(tries) if tries else None

    def _retry_s(self, namespace: str) -> float:
        now = asyncio.get_running_loop().time()
        return _SOON_EVERY_S if now < self._soon_until.get(namespace, 0.0) else _RETRY_FAILED_S

    @staticmethod
    def _vmodel(mesh: Mesh, name: str) -> pb.VModelStatusInfo | None:
        found = mesh.vmodels.get(name)
        return found if found is not None and found.status != pb.VModelStatusInfo.NOT_FOUND else None

    def _with_endpoints(self, status: ModelStatus, namespace: str) -> ModelStatus:
        grpc, http = endpoints(self._known.config, namespace)
        return replace(status, grpc=grpc, http=http)

    # Writing.

    async def _hold(self, informer: Informer, kind: Kind, item: Object) -> Object:
        """Have the object stay until its vmodel is gone."""
        metadata = item["metadata"]
        finalizers = [*(metadata.get("finalizers") or []), FINALIZER]
        change = {"metadata": {"finalizers": finalizers, "resourceVersion": metadata["resourceVersion"]}}
        held = await self._api.patch(kind, ref(item), change)
        informer.put(held)
        return held

    async def _leave(self, source: Source, informer: Informer, item: Object) -> float | None:
        """Let the vmodel of an object go that is being deleted or not served any more, and then the object."""
        self._asked.pop((source.kind.name, ref(item)), None)
        self._tries.pop((source.kind.name, ref(item)), None)
        where, mesh = ref(item), self._meshes(item["metadata"]["namespace"])
        name = where.name
        if mesh.reachable:
            try:
                await mesh.delete_vmodel(name, source.owner)
            except NoInstance:
                return _LOOK_AGAIN_S
        elif self._may_be_told(item):
            # What nobody could be told is let go when instances are there again.
            return _LOOK_AGAIN_S
        metadata = item["metadata"]
        finalizers = [one for one in metadata.get("finalizers") or [] if one != FINALIZER]
        change = {"metadata": {"finalizers": finalizers or None, "resourceVersion": metadata["resourceVersion"]}}
        try:
            await self._api.patch(source.kind, where, change)
        except ApiError as error:
            if not error.missing:
                raise
        return None

    def _may_be_told(self, item: Object) -> bool:
        """Whether an instance may still come that can be told of the deletion."""
        namespace = item["metadata"]["namespace"]
        if self._known.ending(namespace) or not self._known.enabled(namespace):
            return False
        since = item["metadata"].get("deletionTimestamp")
        if since is None:
            return False
        waited = datetime.now(UTC) - datetime.fromisoformat(since)
        up = any((one["spec"].get("replicas") or 0) > 0 for one in self._known.deployments.of(namespace))
        return up and waited.total_seconds() < _LEAVE_WITHIN_S

    async def _write(self, source: Source, informer: Informer, item: Object, status: ModelStatus) -> None:
        now = datetime.now(UTC)
        before, wanted = item.get("status") or {}, source.write(item, status, now)
        if covers(before, wanted):
            return
        self._tell(source, item, status)
        version = item["metadata"]["resourceVersion"]
        change = {"metadata": {"resourceVersion": version}, "status": wanted}
        written = await self._api.patch(source.kind, ref(item), change, "status")
        informer.put(written)

    def _tell(self, source: Source, item: Object, status: ModelStatus) -> None:
        before = source.read(item)
        if at(item, "status", "observedGeneration") != item["metadata"].get("generation"):
            for notice in notices.of_predictor(item):
                self._events.warn(item, "WithoutEffect", notice)
        if status.failure is not None:
            self._events.warn(item, status.failure.reason, status.failure.told)
        elif status.active == "Loaded" and (before.active != "Loaded" or before.target):
            self._events.tell(item, "Loaded", "The model is loaded")


def _pause_s(tries: int) -> float:
    return float(min(_LOOK_AGAIN_S * 2**tries, _RETRY_FAILED_S))


def _unreached(before: ModelStatus, problem: Failure | None, refused: str) -> ModelStatus:
    if problem is not None and problem.reason != UNHEALTHY:
        return observe(None, "", before, problem)
    return unreachable(before, problem.detail if problem is not None else "", refused)


def _with_refused(status: ModelStatus, refused: str) -> ModelStatus:
    """The status of a model that may be served by what was there before, and whose runtime lacks something now."""
    if not refused or status.failure is not None:
        return status
    return replace(status, failure=Failure(UNHEALTHY, refused))


def _clash() -> Failure:
    return Failure(INVALID, "Predictor already exists with the same name from a different source")


def _request(model: WantedModel, target: str, model_type: str, *, load_now: bool) -> pb.SetVModelRequest:
    return pb.SetVModelRequest(
        vModelId=model.name,
        targetModelId=target,
        modelInfo=pb.ModelInfo(type=model_type, path=model.path, key=model.key),
        autoDeleteTargetModel=True,
        loadNow=load_now,
        owner=model.owner,
    )
