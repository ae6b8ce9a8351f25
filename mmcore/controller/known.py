"""What the controller knows of the cluster: the objects of every kind it follows, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from mmcore.controller.api import Api, ApiError
from mmcore.controller.informer import Informer
from mmcore.controller.objects import (
    AUTOSCALERS,
    CLUSTER_SERVING_RUNTIME,
    CONFIG_MAP,
    DEPLOYMENT,
    DISRUPTION_BUDGETS,
    ENABLED_LABEL,
    INFERENCE_SERVICE,
    MANAGER,
    NAMESPACE,
    NETWORK_POLICY,
    POD,
    PREDICTOR,
    SECRET,
    SERVICE,
    SERVICE_LABEL,
    SERVICE_MONITORS,
    SERVING_RUNTIME,
    Kind,
    Object,
    Ref,
    at,
    labels_of,
)
from mmcore.controller.runtimes import Runtime, effective_runtimes
from mmcore.controller.selection import Unfit, select
from mmcore.controller.serving_config import CONFIG_KEY, CONFIG_MAP_NAME, DEFAULTS_KEY, ConfigError, ServingConfig
from mmcore.controller.wanted import InvalidSpec, WantedModel, is_served, of_inference_service, of_predictor

#: Told of every change: the kind, the object before and after.
Changed = Callable[[Kind, Object | None, Object | None], None]


@dataclass(frozen=True, slots=True)
class Installation:
    """What the controller was started with.

    Attributes:
        namespace: its own, where its configuration is.
        cluster: whether it serves other namespaces too.
        etcd_secret: the name of the secret with the connection to etcd.
    """

    namespace: str
    cluster: bool = True
    etcd_secret: str = "model-serving-etcd"  # noqa: S105  # a name


@dataclass(frozen=True, slots=True)
class Selected:
    """What one object asks for: a model and the runtime that it goes to, or why there is none."""

    model: WantedModel | None
    runtime: Runtime | Unfit | None
    invalid: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An object of ours that the API server does not take.

    Attributes:
        runtime: the runtime that it is for; empty for one that all runtimes of the namespace need.
        told: which object it is, and why.
    """

    runtime: str
    told: str


class Known:
    """The objects that the controller follows.

    Attributes:
        config: the configuration that counts.
        storage_secret: the name of the secrets of stores.
        refused: what the API server did not take of what a namespace is to have, by namespace.
    """

    def __init__(self, api: Api, installation: Installation, changed: Changed) -> None:
        self.config = ServingConfig()
        self.storage_secret = self.config.storage_secret
        self.installation: Final = installation
        self.refused: dict[str, list[Refusal]] = {}
        self._changed = changed
        self._runtimes: dict[str, list[Runtime]] = {}
        self._selected: dict[str, dict[tuple[str, str], Selected]] = {}
        self._api = api
        self._optional: dict[str, Informer] = {}
        where = "" if installation.cluster else installation.namespace
        ours = f"app.kubernetes.io/managed-by={MANAGER}"

        def follow(kind: Kind, **options: str) -> Informer:
            options.setdefault("namespace", where)
            return Informer(api, kind, lambda before, after: self._note(kind, before, after), **options)

        def one(kind: Kind, name: str, **options: str) -> Informer:
            # Such a list is allowed by a role that names the object.
            return follow(kind, field_selector=f"metadata.name={name}", **options)

        self._ours, self._follow, self._one = ours, follow, one
        self.predictors = follow(PREDICTOR)
        self.inference_services = follow(INFERENCE_SERVICE)
        self.runtimes = follow(SERVING_RUNTIME)
        self.cluster_runtimes = follow(CLUSTER_SERVING_RUNTIME, namespace="")
        self.namespaces = follow(NAMESPACE, namespace="")
        self.pods = follow(POD, label_selector=SERVICE_LABEL)
        self.deployments = follow(DEPLOYMENT, label_selector=ours)
        self.services = follow(SERVICE, label_selector=ours)
        self.config_maps = follow(CONFIG_MAP, label_selector=ours)
        self.network_policies = follow(NETWORK_POLICY, label_selector=ours)
        self.user_config = one(CONFIG_MAP, CONFIG_MAP_NAME, namespace=installation.namespace)
        self.default_config = one(CONFIG_MAP, f"{CONFIG_MAP_NAME}-defaults", namespace=installation.namespace)
        self.etcd_secrets = one(SECRET, installation.etcd_secret)
        self.storage_secrets = one(SECRET, self.storage_secret)

    @property
    def models(self) -> tuple[Informer, Informer]:
        """Those of the two kinds of object that ask for a model."""
        return self.predictors, self.inference_services

    async def informers(self) -> list[Informer]:
        """Those to run; of kinds that servers may lack or have in older versions, those that this server has."""
        self.follow_stores(await self._configured_storage_secret())
        found = [
            self.predictors,
            self.inference_services,
            self.runtimes,
            self.pods,
            self.deployments,
            self.services,
            self.config_maps,
            self.network_policies,
            self.user_config,
            self.default_config,
            self.etcd_secrets,
            self.storage_secrets,
        ]
        if self.installation.cluster:
            found += [self.cluster_runtimes, self.namespaces]
        for versions in (AUTOSCALERS, DISRUPTION_BUDGETS, SERVICE_MONITORS):
            kind = await self._api.served(versions)
            if kind is not None:
                informer = self._follow(kind, label_selector=self._ours)
                self._optional[kind.name] = informer
                found.append(informer)
        return found

    def follow_stores(self, name: str) -> Informer:
        """Have the secrets of this name be those of stores; the informer, to be run, knows none at first."""
        self.storage_secret = name
        self.storage_secrets = self._one(SECRET, name)
        return self.storage_secrets

    async def _configured_storage_secret(self) -> str:
        texts = []
        for name, key in ((f"{CONFIG_MAP_NAME}-defaults", DEFAULTS_KEY), (CONFIG_MAP_NAME, CONFIG_KEY)):
            try:
                found = await self._api.get(CONFIG_MAP, Ref(self.installation.namespace, name))
            except ApiError as error:
                if not error.missing:
                    raise
            else:
                texts.append(str(at(found, "data", key) or ""))
        try:
            return ServingConfig.read(*texts).storage_secret
        except ConfigError:
            # It is told when the configuration is taken over.
            return ServingConfig().storage_secret

    def optional(self, versions: tuple[Kind, ...]) -> Informer | None:
        """The informer of a kind that the server may lack."""
        return self._optional.get(versions[0].name)

    def enabled(self, namespace: str) -> bool:
        """Whether a namespace is served: by its label; the controller's own unless its label says no."""
        if not self.installation.cluster:
            return namespace == self.installation.namespace
        found = self.namespaces.get("", namespace)
        if found is None or at(found, "metadata", "deletionTimestamp"):
            return False
        default = "true" if namespace == self.installation.namespace else ""
        return labels_of(found).get(ENABLED_LABEL, default) == "true"

    def ending(self, namespace: str) -> bool:
        """Whether a namespace is being deleted, or gone."""
        if not self.installation.cluster:
            return False
        found = self.namespaces.get("", namespace)
        return found is None or bool(at(found, "metadata", "deletionTimestamp"))

    def enabled_namespaces(self) -> list[str]:
        """All that are served."""
        if not self.installation.cluster:
            return [self.installation.namespace]
        return [where.name for where in self.namespaces.items if self.enabled(where.name)]

    def effective_runtimes(self, namespace: str) -> list[Runtime]:
        """The runtimes that count in a namespace."""
        found = self._runtimes.get(namespace)
        if found is None:
            found = effective_runtimes(self.runtimes.of(namespace), self.cluster_runtimes.items.values())
            self._runtimes[namespace] = found
        return found

    def selected(self, kind: Kind, item: Object) -> Selected:
        """What an object asks for, and where that goes."""
        namespace, name = item["metadata"]["namespace"], item["metadata"]["name"]
        cache = self._selected.setdefault(namespace, {})
        found = cache.get((kind.name, name))
        if found is None:
            found = cache[kind.name, name] = self._select(kind, item)
        return found

    def refusal(self, namespace: str, runtime: str) -> str:
        """What the API server does not take of what a runtime needs; empty where it has all."""
        found = [one.told for one in self.refused.get(namespace, ()) if one.runtime in ("", runtime)]
        return "; ".join(found)

    def users(self, namespace: str) -> Iterator[Selected]:
        """What all objects of a namespace ask for."""
        for item in self.predictors.of(namespace):
            yield self.selected(PREDICTOR, item)
        for item in self.inference_services.of(namespace):
            if is_served(item):
                yield self.selected(INFERENCE_SERVICE, item)

    def forget_selections(self) -> None:
        """Decide all anew, when the configuration has changed."""
        self._selected.clear()

    def _select(self, kind: Kind, item: Object) -> Selected:
        try:
            model = of_predictor(item) if kind is PREDICTOR else of_inference_service(item)
        except InvalidSpec as error:
            return Selected(None, None, str(error))
        return Selected(model, select(model, self.effective_runtimes(item["metadata"]["namespace"])))

    def _note(self, kind: Kind, before: Object | None, after: Object | None) -> None:
        item: Any = after if after is not None else before
        namespace = item["metadata"].get("namespace", "")
        if kind is SERVING_RUNTIME:
            self._runtimes.pop(namespace, None)
            self._selected.pop(namespace, None)
        elif kind is CLUSTER_SERVING_RUNTIME:
            self._runtimes.clear()
            self._selected.clear()
        elif kind in (PREDICTOR, INFERENCE_SERVICE) and not _same_request(before, after):
            self._selected.get(namespace, {}).pop((kind.name, item["metadata"]["name"]), None)
        self._changed(kind, before, after)


def _same_request(before: Object | None, after: Object | None) -> bool:
    """Whether two versions of an object ask for the same: all but their status is."""
    if before is None or after is None:
        return False
    return bool(
        before["metadata"].get("generation") == after["metadata"].get("generation")
        and before["metadata"].get("annotations") == after["metadata"].get("annotations")
        and before["metadata"].get("uid") == after["metadata"].get("uid")
    )
