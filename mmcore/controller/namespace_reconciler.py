"""Has everything in a namespace that its mesh needs and nothing else: runtimes, Service, policies, files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import orjson

from mmcore.controller import mesh_manifests as manifests
from mmcore.controller import notices, pods
from mmcore.controller.api import Api, ApiError
from mmcore.controller.deployment import CONSTRAINTS_MAP, Place, claims_of, deployment, deployment_name
from mmcore.controller.events import Events
from mmcore.controller.informer import Informer
from mmcore.controller.known import Known, Refusal
from mmcore.controller.mesh import Mesh, NoInstance
from mmcore.controller.mesh_tls import tls_of
from mmcore.controller.objects import (
    AUTOSCALERS,
    CONFIG_MAP,
    DEPLOYMENT,
    DISRUPTION_BUDGETS,
    NETWORK_POLICY,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SECRET,
    SERVICE,
    SERVICE_LABEL,
    SERVICE_MONITORS,
    Kind,
    Object,
    Ref,
    annotations_of,
    at,
    covers,
    deleting,
    labels_of,
    ref,
)
from mmcore.controller.runtimes import Runtime, problems
from mmcore.controller.scaling import IDLE_SINCE, scale
from mmcore.controller.statuses import merge_conditions

log = logging.getLogger(__name__)

#: On what is applied: the digest of it. Without it an object is somebody else's.
APPLIED: Final = "serving.kserve.io/applied"
#: On pods: the digest of their mounted files. The kubelet brings those up to date when a pod's annotations change,
#: instead of within a minute or two.
FILES: Final = "serving.kserve.io/files"


#: The kind and the name of an object that the API server did not take, and why.
_Refused = tuple[Kind, str, ApiError]


@dataclass(slots=True)
class _Plan:
    """What a namespace is to have: its objects by kind, names that stay as they are, and when to look again.

    ``runtimes`` are those that objects are made of, by the objects' names.
    """

    wanted: dict[Kind, dict[str, Object]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    runtimes: dict[str, Object] = field(default_factory=dict)
    look_again_s: float | None = None

    def add(self, kind: Kind, item: Object) -> None:
        self.wanted.setdefault(kind, {})[item["metadata"]["name"]] = item

    def look_again(self, seconds: float | None) -> None:
        if seconds is not None:
            self.look_again_s = min(seconds, self.look_again_s or seconds)


class NamespaceReconciler:
    """Works on one namespace at a time."""

    def __init__(self, api: Api, known: Known, events: Events, refused: Callable[[str], object]) -> None:
        """``refused`` is told the namespace in which the API server takes other objects than before."""
        self._api = api
        self._known = known
        self._events = events
        self._refused = refused
        #: Of each namespace the kinds and names of the objects that the server failed to take the last time.
        self._failed: dict[str, set[tuple[str, str]]] = {}

    async def reconcile(self, namespace: str, mesh: Mesh) -> float | None:
        """Bring a namespace to where it is to be; the seconds after which to look again."""
        known = self._known
        mesh.set_addresses(self._addresses(namespace))
        if known.ending(namespace):
            known.refused.pop(namespace, None)
            self._failed.pop(namespace, None)
            return None
        plan = await self._plan(namespace) if known.enabled(namespace) else _Plan()
        # Before the pods that mount it.
        refused = await self._etcd_secret(namespace)
        for kind, informer in self._informers():
            refused += await self._settle(namespace, kind, informer, plan)
        await self._refresh_files(namespace)
        self._tell_refused(namespace, plan, refused)
        if refused:
            # All else is done; what was refused is tried again.
            raise refused[0][-1]
        return plan.look_again_s

    def _tell_refused(self, namespace: str, plan: _Plan, refused: Iterable[_Refused]) -> None:
        """Events on the runtimes that lack something, and word to the models that are to be served by them."""
        found, failed = [], set()
        for kind, name, error in refused:
            # One that was changed meanwhile, or a server with too much to do, takes it the next time.
            if error.conflict or error.code == 429 or error.code > 500:
                continue
            if error.code == 500:
                # The server's own failure, for once; and what older ones say of an object with a value of a wrong type.
                failed.add((kind.name, name))
                if (kind.name, name) not in self._failed.get(namespace, ()):
                    continue
            told = f"The API server refuses the {kind.name} {name}: {error}"
            runtime = plan.runtimes.get(name)
            for one in [runtime] if runtime is not None else plan.runtimes.values():
                self._events.warn(one, "Refused", told)
            found.append(Refusal(runtime["metadata"]["name"] if runtime is not None else "", told))
        self._failed[namespace] = failed
        if found != self._known.refused.pop(namespace, []):
            self._refused(namespace)
        if found:
            self._known.refused[namespace] = found

    async def _settle(self, namespace: str, kind: Kind, informer: Informer, plan: _Plan) -> list[_Refused]:
        """Delete and apply the objects of one kind; what the API server refused harms no other."""
        wanted = plan.wanted.get(kind, {})
        refused: list[_Refused] = []
        for item in list(informer.of(namespace)):
            name = item["metadata"]["name"]
            if name not in wanted and name not in plan.kept and not deleting(item):
                await self._api.delete(kind, ref(item))
        for item in wanted.values():
            try:
                await self._apply(kind, informer, item)
            except ApiError as error:
                if not error.code:
                    raise
                refused.append((kind, item["metadata"]["name"], error))
        return refused

    async def validate(self, kind: Kind, informer: Informer, where: Ref) -> None:
        """Tell a runtime's user what is wrong with it, in its status and an Event."""
        item = informer.items.get(where)
        if item is None or deleting(item):
            return
        runtime = Runtime.of(item, kind)
        found = problems(runtime, self._known.config) if runtime.multi_model and not runtime.disabled else []
        condition = {
            "type": "Valid",
            "status": "False" if found else "True",
            "reason": "InvalidSpec" if found else "Valid",
            "message": "; ".join(found),
            "observedGeneration": item["metadata"].get("generation", 0),
        }
        before = at(item, "status", "conditions") or []
        conditions = merge_conditions(before, [condition], datetime.now(UTC))
        if found:
            self._events.warn(item, "InvalidSpec", condition["message"])
        if not covers(before, conditions):
            for notice in notices.of_runtime(runtime):
                self._events.warn(item, "WithoutEffect", notice)
            version = item["metadata"]["resourceVersion"]
            change = {"metadata": {"resourceVersion": version}, "status": {"conditions": conditions}}
            try:
                informer.put(await self._api.patch(kind, where, change, "status"))
            except ApiError as error:
                # It has gone, or its kind is KServe's own, which has no status: the Event stands for it.
                if not error.missing:
                    raise

    # What is wanted.

    async def _plan(self, namespace: str) -> _Plan:
        known, plan = self._known, _Plan()
        config = known.config
        runtimes = known.effective_runtimes(namespace)
        used, claims = self._used(namespace)
        etcd = known.etcd_secrets.get(known.installation.namespace, known.installation.etcd_secret)
        place = Place(
            namespace,
            known.installation.etcd_secret,
            await self._claims(namespace, claims),
            manifests.etcd_prefix(etcd, namespace if namespace != known.installation.namespace else ""),
        )
        served = False
        tls = await self._tls_trouble(namespace)
        for runtime in runtimes:
            if runtime.disabled or not runtime.multi_model:
                continue
            served = True
            if problems(runtime, config):
                # What runs stays as it is until the runtime is mended.
                plan.kept.add(deployment_name(config, runtime.name))
                continue
            if etcd is None:
                message = f"the secret {known.installation.etcd_secret} is missing in {known.installation.namespace}"
                self._events.warn(runtime.resource, "EtcdSecretMissing", message)
            if tls:
                self._events.warn(runtime.resource, "TlsSecretUnusable", tls)
            self._add_runtime(plan, runtime, place, wanted=runtime.name in used)
        if not served:
            return plan
        plan.add(SERVICE, manifests.service(config, namespace))
        plan.add(CONFIG_MAP, manifests.constraints_map(config, namespace, runtimes))
        plan.add(NETWORK_POLICY, manifests.network_policy(config, namespace))
        monitors, service = known.optional(SERVICE_MONITORS), known.services.get(namespace, config.service_name)
        if monitors is not None and service is not None and config.metrics and config.service_monitor:
            plan.add(monitors.kind, manifests.service_monitor(config, namespace, service, monitors.kind))
        return plan

    def _add_runtime(self, plan: _Plan, runtime: Runtime, place: Place, *, wanted: bool) -> None:
        known, config, namespace = self._known, self._known.config, place.namespace
        name = deployment_name(config, runtime.name)
        found = known.deployments.get(namespace, name)
        decided = scale(runtime, config, found, wanted=wanted, now=datetime.now(UTC))
        plan.look_again(decided.look_again_s)
        item = deployment(runtime, config, place, decided.replicas)
        # Only digested is what is ours for good: an autoscaler may change the replicas.
        marks = {APPLIED: _digest(item, "replicas" if manifests.scale_bounds(runtime) else "")}
        if decided.idle_since:
            marks[IDLE_SINCE] = decided.idle_since
        item["metadata"]["annotations"] = marks
        if found is not None and manifests.scale_bounds(runtime):
            # The autoscaler may have decided otherwise since: replicas that it has left behind are not to come back.
            item["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
        plan.add(DEPLOYMENT, item)
        plan.runtimes[name] = runtime.resource
        if budgets := known.optional(DISRUPTION_BUDGETS):
            plan.add(budgets.kind, manifests.disruption_budget(runtime, config, namespace, budgets.kind))
        scalers = known.optional(AUTOSCALERS)
        if scalers is not None and decided.replicas:
            scaler = manifests.autoscaler(runtime, config, namespace, scalers.kind)
            if scaler is not None:
                plan.add(scalers.kind, scaler)

    async def _tls_trouble(self, namespace: str) -> str:
        """Why pods wait for the secret of TLS, or the controller cannot use it; looked for while a pod is not ready."""
        waiting = [pod for pod in self._known.pods.of(namespace) if not pods.is_ready(pod)]
        if not self._known.config.tls_secret or not waiting:
            return ""
        try:
            await tls_of(self._api, lambda: self._known.config, namespace)
        except NoInstance as error:
            return str(error)
        return ""

    def _used(self, namespace: str) -> tuple[set[str], set[str]]:
        """The runtimes that models go to, and the volume claims that models name."""
        runtimes, claims = set(), set()
        for selected in self._known.users(namespace):
            if isinstance(selected.runtime, Runtime):
                runtimes.add(selected.runtime.name)
            if selected.model is not None and selected.model.claim:
                claims.add(selected.model.claim)
        return runtimes, claims

    async def _claims(self, namespace: str, named: Iterable[str]) -> tuple[str, ...]:
        secret = self._known.storage_secrets.get(namespace, self._known.storage_secret)
        entries, broken = manifests.storage_entries(secret)
        if broken and secret is not None:
            self._events.warn(secret, "InvalidEntry", f"no JSON object: {', '.join(broken)}")
        existing = None
        if self._known.config.allow_any_pvc:
            existing = [name for name in named if await self._exists(namespace, name)]
        return claims_of(entries, named, existing)

    async def _exists(self, namespace: str, claim: str) -> bool:
        try:
            await self._api.get(PERSISTENT_VOLUME_CLAIM, Ref(namespace, claim))
        except ApiError as error:
            if error.missing:
                return False
            raise
        return True

    # What is done.

    def _informers(self) -> Iterable[tuple[Kind, Informer]]:
        known = self._known
        # Files before the pods that mount them.
        yield from ((one.kind, one) for one in (known.config_maps, known.services, known.network_policies))
        yield DEPLOYMENT, known.deployments
        for versions in (AUTOSCALERS, DISRUPTION_BUDGETS, SERVICE_MONITORS):
            if informer := known.optional(versions):
                yield informer.kind, informer

    async def _apply(self, kind: Kind, informer: Informer, item: Object) -> None:
        marks = item["metadata"].setdefault("annotations", {})
        marks.setdefault(APPLIED, _digest(item))
        found = informer.items.get(ref(item))
        if found is not None and covers(found, item) and (IDLE_SINCE in marks) == (IDLE_SINCE in annotations_of(found)):
            return
        if (
            kind is SERVICE
            and found is not None
            and (at(found, "spec", "clusterIP") == "None") != ("clusterIP" in item["spec"])
        ):
            # A Service cannot be made headless, or have an address given, once it is there.
            await self._api.delete(SERVICE, ref(item))
        if found is None and kind is DEPLOYMENT:
            await self._make_room(ref(item))
        await self._api.apply(kind, item)

    async def _make_room(self, where: Ref) -> None:
        """Delete a Deployment of this name that is not ours: the archived release's has other containers."""
        try:
            found = await self._api.get(DEPLOYMENT, where)
        except ApiError as error:
            if error.missing:
                return
            raise
        if APPLIED not in annotations_of(found):
            log.warning("replacing the deployment %s, which is not of this controller", where)
            await self._api.delete(DEPLOYMENT, where)

    async def _etcd_secret(self, namespace: str) -> list[_Refused]:
        """Give another namespace than ours its copy of the secret of etcd, or take it away."""
        installation, secrets = self._known.installation, self._known.etcd_secrets
        source = secrets.get(installation.namespace, installation.etcd_secret)
        if namespace == installation.namespace or source is None:
            return []
        where = Ref(namespace, installation.etcd_secret)
        found = secrets.items.get(where)
        try:
            if self._known.enabled(namespace):
                await self._apply(SECRET, secrets, manifests.etcd_secret(source, namespace))
            elif found is not None and APPLIED in annotations_of(found):
                await self._api.delete(SECRET, where)
        except ValueError as error:
            self._events.warn(source, "InvalidSecret", str(error))
        except ApiError as error:
            if not error.code:
                raise
            return [(SECRET, installation.etcd_secret, error)]
        return []

    async def _refresh_files(self, namespace: str) -> None:
        """Have pods that run see changed files at once."""
        known = self._known
        constraints = known.config_maps.get(namespace, CONSTRAINTS_MAP)
        if constraints is None:
            return
        stores = known.storage_secrets.get(namespace, known.storage_secret) or {}
        etcd = known.etcd_secrets.get(namespace, known.installation.etcd_secret) or {}
        digest = _digest({"files": [constraints["data"], stores.get("data"), etcd.get("data")]})
        for pod in list(known.pods.of(namespace)):
            stated = annotations_of(pod).get(FILES)
            if stated != digest and not deleting(pod):
                await self._annotate(ref(pod), digest)

    async def _annotate(self, where: Ref, digest: str) -> None:
        try:
            await self._api.patch(POD, where, {"metadata": {"annotations": {FILES: digest}}})
        except ApiError as error:
            if not error.missing:
                raise

    def _addresses(self, namespace: str) -> list[str]:
        config = self._known.config
        found = [
            pods.address(pod, config.grpc_port)
            for pod in self._known.pods.of(namespace)
            if labels_of(pod).get(SERVICE_LABEL) == config.service_name and pods.is_ready(pod)
        ]
        return [config.endpoint] if config.endpoint and found else found


def _digest(item: Object, without: str = "") -> str:
    content = item
    if without:
        content = {**item, "spec": {key: value for key, value in item["spec"].items() if key != without}}
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
