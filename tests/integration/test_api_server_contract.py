"""What controllers rely on in an API server, shown of the real one and of ours for tests alike."""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.api_servers import CONTROLLER, CONTROLLER_TOKEN, TOKEN, ApiServer, OwnApiServer, RealApiServer, assets

pytestmark = pytest.mark.slow

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
GROUP = "/apis/contract.test/v1"
RBAC = "/apis/rbac.authorization.k8s.io/v1"

#: A kind of objects with everything in its schema that ours use.
DEFINITION = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "things.contract.test"},
    "spec": {
        "group": "contract.test",
        "scope": "Namespaced",
        "names": {"kind": "Thing", "listKind": "ThingList", "plural": "things", "singular": "thing"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {
                                "type": "object",
                                "required": ["size"],
                                "properties": {
                                    "size": {"type": "integer", "minimum": 1},
                                    "colour": {"type": "string", "enum": ["red", "blue"], "default": "red"},
                                    "name": {"type": "string", "pattern": "^[a-z]+$"},
                                    "plain": {"type": "array", "items": {"type": "string"}},
                                    "names": {
                                        "type": "array",
                                        "items": {"type": "string"},
                                        "x-kubernetes-list-type": "set",
                                    },
                                    "parts": {
                                        "type": "array",
                                        "items": {
                                            "type": "object",
                                            "required": ["name"],
                                            "properties": {
                                                "name": {"type": "string"},
                                                "value": {"type": "integer", "default": 7},
                                                "note": {"type": "string"},
                                            },
                                        },
                                        "x-kubernetes-list-type": "map",
                                        "x-kubernetes-list-map-keys": ["name"],
                                    },
                                    "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                                },
                                "x-kubernetes-validations": [
                                    {"rule": "!has(self.name) || self.name != 'forbidden'", "message": "not this name"}
                                ],
                            },
                            "status": {
                                "type": "object",
                                "default": {"phase": "New"},
                                "properties": {"phase": {"type": "string"}, "count": {"type": "integer"}},
                            },
                        },
                    }
                },
            }
        ],
    },
}


class Client:
    """A user of one server, in a namespace of its own."""

    def __init__(self, server: ApiServer, token: str = TOKEN, namespace: str = "") -> None:
        self.server = server
        self.token = token
        self.namespace = namespace or f"contract-{os.urandom(4).hex()}"

    def ask(self, method: str, path: str, body: Any = None, content: str = "application/json") -> tuple[int, Any]:
        """The code and the answer."""
        try:
            return 200, self.server.ask(method, path, body, content, self.token)
        except urllib.error.HTTPError as error:
            body = error.read()
            # What is at no path at all is answered with text.
            return error.code, json.loads(body) if body.startswith(b"{") else body.decode()

    def things(self, name: str = "", subresource: str = "") -> str:
        return "/".join(filter(None, (f"{GROUP}/namespaces/{self.namespace}/things", name, subresource)))

    def own(self, plural: str, name: str = "", root: str = "/api/v1") -> str:
        return "/".join(filter(None, (f"{root}/namespaces/{self.namespace}/{plural}", name)))

    def create(self, name: str, /, **fields: Any) -> dict[str, Any]:
        code, made = self.ask("POST", self.things(), thing(name, **fields))
        assert code == 200, made
        return dict(made)

    def apply(self, item: dict[str, Any], manager: str, *, force: bool = False, path: str = "") -> tuple[int, Any]:
        query = f"?fieldManager={manager}" + ("&force=true" if force else "")
        return self.ask("PATCH", (path or self.things(item["metadata"]["name"])) + query, item, APPLY)

    def watch(self, query: str, path: str = "") -> Iterator[dict[str, Any]]:
        """The events until the server ends the watch."""
        url = f"{self.server.url}{path or self.things()}?watch=true&{query}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, context=self.server.trust, timeout=30) as answer:
            for line in answer:
                yield json.loads(line)


def thing(name: str, /, *, metadata: Any = None, status: Any = None, **spec: Any) -> dict[str, Any]:
    item = {
        "apiVersion": "contract.test/v1",
        "kind": "Thing",
        "metadata": {"name": name, **(metadata or {})},
        "spec": {"size": 1, **spec},
    }
    return {**item, "status": status} if status is not None else item


@pytest.fixture(scope="module", params=["ours", "real"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    if request.param == "real" and assets() is None:
        pytest.skip("no API server is built: make kube-apiserver")
    kind = OwnApiServer if request.param == "ours" else RealApiServer
    started: ApiServer = kind(tmp_path_factory.mktemp("kubernetes"))
    try:
        started.start()
        started.define(DEFINITION)
        yield started
    finally:
        started.stop()


@pytest.fixture
def client(server: ApiServer) -> Client:
    made = Client(server)
    code, _ = made.ask("POST", "/api/v1/namespaces", {"metadata": {"name": made.namespace}})
    assert code == 200
    return made


def names(listed: Any) -> list[str]:
    return [item["metadata"]["name"] for item in listed["items"]]


# Versions.


def test_a_version_that_is_not_the_last_is_refused(client: Client) -> None:
    first = client.create("a")
    code, second = client.ask("PUT", client.things("a"), {**first, "spec": {"size": 2}})
    assert code == 200 and int(second["metadata"]["resourceVersion"]) > int(first["metadata"]["resourceVersion"])
    code, refused = client.ask("PUT", client.things("a"), {**first, "spec": {"size": 3}})
    assert (code, refused["reason"]) == (409, "Conflict")
    change = {"metadata": {"resourceVersion": first["metadata"]["resourceVersion"]}, "spec": {"size": 3}}
    assert client.ask("PATCH", client.things("a"), change, MERGE)[0] == 409
    code, merged = client.ask("PATCH", client.things("a"), {"spec": {"size": 3}}, MERGE)
    assert code == 200 and merged["spec"]["size"] == 3


def test_a_whole_custom_object_needs_a_version_and_another_kind_does_not(client: Client) -> None:
    client.create("a")
    code, refused = client.ask("PUT", client.things("a"), thing("a", size=2))
    assert (code, refused["reason"]) == (422, "Invalid")
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"x": "1"}}
    assert client.ask("POST", client.own("configmaps"), settings)[0] == 200
    assert client.ask("PUT", client.own("configmaps", "a"), settings)[0] == 200


def test_what_changes_nothing_makes_no_version(client: Client) -> None:
    def settles(change: Callable[[], tuple[int, Any]]) -> bool:
        """Whether a change that is made again and again ends to make versions.

        Old servers write once or twice more what they have just made, as long as their cache has not seen it.
        """
        before = ""
        for _ in range(50):
            code, made = change()
            assert code == 200, made
            if made["metadata"]["resourceVersion"] == before:
                return True
            before = made["metadata"]["resourceVersion"]
        return False

    client.create("a")
    assert settles(lambda: client.ask("PATCH", client.things("a"), {"spec": {"size": 1}}, MERGE))
    assert settles(lambda: client.apply(thing("b"), "one"))


def test_what_is_there_is_not_made_again_and_what_is_not_is_missing(client: Client) -> None:
    client.create("a")
    code, refused = client.ask("POST", client.things(), thing("a"))
    assert (code, refused["reason"]) == (409, "AlreadyExists")
    for method, body in (("GET", None), ("DELETE", None), ("PATCH", {"spec": {"size": 1}})):
        code, refused = client.ask(method, client.things("none"), body, MERGE)
        assert (code, refused["reason"]) == (404, "NotFound")
    nowhere = Client(client.server, namespace="nowhere-at-all")
    assert nowhere.ask("POST", nowhere.things(), thing("a"))[0] == 404


def test_generated_names(client: Client) -> None:
    item = thing("x")
    item["metadata"] = {"generateName": "gen-"}
    found = {client.ask("POST", client.things(), item)[1]["metadata"]["name"] for _ in range(3)}
    assert len(found) == 3 and all(name.startswith("gen-") for name in found)


def test_generations_count_what_is_wanted(client: Client) -> None:
    assert client.create("a")["metadata"]["generation"] == 1
    _, found = client.ask("PATCH", client.things("a"), {"metadata": {"labels": {"a": "b"}}}, MERGE)
    assert found["metadata"]["generation"] == 1
    _, found = client.ask("PATCH", client.things("a", "status"), {"status": {"phase": "Old"}}, MERGE)
    assert found["metadata"]["generation"] == 1
    _, found = client.ask("PATCH", client.things("a"), {"spec": {"size": 2}}, MERGE)
    assert found["metadata"]["generation"] == 2


# Schemas.


def test_unknown_fields_go_and_defaults_come(client: Client) -> None:
    made = client.create("a", nothing=1, any={"b": {"c": [1]}}, parts=[{"name": "p", "unknown": 1}], labels={"x": "y"})
    assert made["spec"] == {
        "size": 1,
        "colour": "red",
        "any": {"b": {"c": [1]}},
        "parts": [{"name": "p", "value": 7}],
        "labels": {"x": "y"},
    }
    _, found = client.ask("PATCH", client.things("a"), {"spec": {"colour": None, "parts": None}}, MERGE)
    assert found["spec"]["colour"] == "red" and "parts" not in found["spec"]


@pytest.mark.parametrize(
    "spec",
    [{"size": 0}, {"size": "1"}, {"size": None}, {"colour": "green"}, {"name": "A1"}, {"parts": [{"value": 1}]}],
    ids=str,
)
def test_what_breaks_the_schema_is_refused(client: Client, spec: dict[str, Any]) -> None:
    code, refused = client.ask("POST", client.things(), thing("a", **spec))
    assert (code, refused["reason"]) == (422, "Invalid")
    client.create("b")
    if spec != {"size": None}:
        assert client.ask("PATCH", client.things("b"), {"spec": spec}, MERGE)[0] == 422


def test_rules_in_cel(client: Client) -> None:
    if not client.server.has_cel:
        pytest.skip("this server is too old for rules in CEL")
    code, refused = client.ask("POST", client.things(), thing("a", name="forbidden"))
    assert (code, refused["reason"]) == (422, "Invalid") and "not this name" in refused["message"]
    client.create("a", name="allowed")
    assert client.ask("PATCH", client.things("a"), {"spec": {"name": "forbidden"}}, MERGE)[0] == 422


def test_names_are_those_of_domains(client: Client) -> None:
    assert client.ask("POST", client.things(), thing("No_Name"))[0] == 422


# Status.


def test_status_is_written_by_its_own_path_alone(client: Client) -> None:
    made = client.create("a", metadata={}, status={"phase": "Mine", "count": 3})
    assert made["status"] == {"phase": "New"}
    _, found = client.ask("PATCH", client.things("a"), {"status": {"phase": "Mine"}, "spec": {"size": 2}}, MERGE)
    assert found["status"] == {"phase": "New"} and found["spec"]["size"] == 2
    change = {"status": {"phase": "Old", "unknown": 1}, "spec": {"size": 5}, "metadata": {"labels": {"a": "b"}}}
    _, found = client.ask("PATCH", client.things("a", "status"), change, MERGE)
    assert found["status"] == {"phase": "Old"} and found["spec"]["size"] == 2
    assert "labels" not in found["metadata"]
    _, read = client.ask("GET", client.things("a"))
    assert read == found


# Lists and watches.


def test_lists_come_in_pages_of_one_moment(client: Client) -> None:
    for name in ("a", "b", "c", "d", "e"):
        client.create(name)
    _, first = client.ask("GET", client.things() + "?limit=2")
    assert names(first) == ["a", "b"]
    client.create("bb")
    client.ask("DELETE", client.things("d"))
    _, second = client.ask("GET", f"{client.things()}?limit=2&continue={first['metadata']['continue']}")
    _, third = client.ask("GET", f"{client.things()}?limit=2&continue={second['metadata']['continue']}")
    assert names(second) + names(third) == ["c", "d", "e"] and not third["metadata"].get("continue")
    assert first["metadata"]["resourceVersion"] == third["metadata"]["resourceVersion"]
    assert names(client.ask("GET", client.things())[1]) == ["a", "b", "bb", "c", "e"]


def test_selectors(client: Client) -> None:
    client.create("a", metadata={"labels": {"x": "1"}})
    client.create("b", metadata={"labels": {"x": "2"}})
    client.create("c")
    for query, found in (
        ("labelSelector=x", ["a", "b"]),
        ("labelSelector=x=2", ["b"]),
        ("fieldSelector=metadata.name=c", ["c"]),
    ):
        assert names(client.ask("GET", f"{client.things()}?{query}")[1]) == found


def test_a_watch_tells_what_happens_after_a_version(client: Client) -> None:
    first = client.create("a", metadata={"labels": {"x": "1"}})
    client.create("b")
    client.ask("PATCH", client.things("a"), {"spec": {"size": 2}}, MERGE)
    client.ask("PATCH", client.things("a", "status"), {"status": {"phase": "Old"}}, MERGE)
    client.ask("DELETE", client.things("b"))
    version = first["metadata"]["resourceVersion"]
    found = [(event["type"], event["object"]) for event in client.watch(f"resourceVersion={version}&timeoutSeconds=1")]
    assert [(kind, item["metadata"]["name"]) for kind, item in found] == [
        ("ADDED", "b"),
        ("MODIFIED", "a"),
        ("MODIFIED", "a"),
        ("DELETED", "b"),
    ]
    versions = [int(item["metadata"]["resourceVersion"]) for _, item in found]
    assert versions == sorted(versions) and versions[0] > int(version)


def test_a_watch_from_nowhere_begins_with_what_is_there(client: Client) -> None:
    client.create("a")
    started = threading.Timer(0.3, client.create, ("b",))
    started.start()
    found = [(event["type"], event["object"]["metadata"]["name"]) for event in client.watch("timeoutSeconds=2")]
    started.join()
    assert found == [("ADDED", "a"), ("ADDED", "b")]


def test_a_watch_by_labels_sees_objects_come_and_go(client: Client) -> None:
    first = client.create("a")
    client.ask("PATCH", client.things("a"), {"metadata": {"labels": {"x": "1"}}}, MERGE)
    client.ask("PATCH", client.things("a"), {"spec": {"size": 2}}, MERGE)
    client.ask("PATCH", client.things("a"), {"metadata": {"labels": {"x": None}}}, MERGE)
    version = first["metadata"]["resourceVersion"]
    events = client.watch(f"labelSelector=x&resourceVersion={version}&timeoutSeconds=1")
    assert [event["type"] for event in events] == ["ADDED", "MODIFIED", "DELETED"]


def test_a_watch_that_asks_for_them_gets_bookmarks(client: Client) -> None:
    version = client.create("a")["metadata"]["resourceVersion"]
    other = Client(client.server)
    other.ask("POST", "/api/v1/namespaces", {"metadata": {"name": other.namespace}})
    # Nothing happens here, and the watch need not go back to where it began.
    later = threading.Timer(0.5, other.create, ("a",))
    later.start()
    found = list(client.watch(f"resourceVersion={version}&timeoutSeconds=5&allowWatchBookmarks=true"))
    later.join()
    assert {event["type"] for event in found} == {"BOOKMARK"}
    assert int(found[-1]["object"]["metadata"]["resourceVersion"]) > int(version)
    assert found[-1]["object"]["kind"] == "Thing"


def test_a_version_that_is_too_old_is_gone(client: Client) -> None:
    client.create("a")
    [event] = client.watch("resourceVersion=1&timeoutSeconds=2")
    assert event["type"] == "ERROR"
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")


# Deletion.


def test_finalizers_keep_an_object_until_they_are_gone(client: Client) -> None:
    client.create("a", metadata={"finalizers": ["contract.test/a"]})
    _, kept = client.ask("DELETE", client.things("a"))
    assert kept["metadata"]["deletionTimestamp"] and kept["metadata"]["generation"] == 2
    _, again = client.ask("DELETE", client.things("a"))
    assert again["metadata"]["resourceVersion"] == kept["metadata"]["resourceVersion"]
    more = {"metadata": {"finalizers": ["contract.test/a", "contract.test/b"]}}
    assert client.ask("PATCH", client.things("a"), more, MERGE)[0] == 422
    change = {"metadata": {"finalizers": None, "resourceVersion": kept["metadata"]["resourceVersion"]}}
    assert client.ask("PATCH", client.things("a"), change, MERGE)[0] == 200
    assert client.ask("GET", client.things("a"))[0] == 404
    events = list(client.watch(f"resourceVersion={kept['metadata']['resourceVersion']}&timeoutSeconds=1"))
    assert [event["type"] for event in events] == ["DELETED"]


def test_a_deletion_may_state_what_it_means(client: Client) -> None:
    made = client.create("a")
    other = {"preconditions": {"uid": "00000000-0000-0000-0000-000000000000"}}
    assert client.ask("DELETE", client.things("a"), other)[0] == 409
    same = {"preconditions": {"uid": made["metadata"]["uid"]}, "propagationPolicy": "Background"}
    assert client.ask("DELETE", client.things("a"), same)[0] == 200


def test_a_namespace_that_ends_takes_nothing_new(client: Client) -> None:
    client.ask("DELETE", f"/api/v1/namespaces/{client.namespace}")
    _, found = client.ask("GET", f"/api/v1/namespaces/{client.namespace}")
    assert found["metadata"]["deletionTimestamp"] and found["status"]["phase"] == "Terminating"
    code, refused = client.ask("POST", client.things(), thing("a"))
    assert (code, refused["reason"]) == (403, "Forbidden")
    # It is gone when nobody has anything to do in it any more.
    path = f"/api/v1/namespaces/{client.namespace}"
    item = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": client.namespace}, "spec": {}}
    assert client.ask("PUT", f"{path}/finalize", item)[0] == 200
    assert client.ask("GET", path)[0] == 404


# Server-side apply.


def owners(item: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {
        (entry["manager"], entry["operation"]): entry["fieldsV1"]
        for entry in item["metadata"].get("managedFields") or []
    }


def test_who_applies_a_field_manages_it(client: Client) -> None:
    _, made = client.apply(thing("a", name="x", parts=[{"name": "p", "note": "n"}], names=["s"]), "one")
    assert owners(made)["one", "Apply"] == {
        "f:spec": {
            "f:size": {},
            "f:name": {},
            "f:names": {'v:"s"': {}},
            "f:parts": {'k:{"name":"p"}': {".": {}, "f:name": {}, "f:note": {}}},
        }
    }
    # Others' fields are not to be changed, unless by force, and may be shared.
    code, refused = client.apply(thing("a", name="y"), "two")
    assert code == 409 and 'conflict with "one"' in refused["message"]
    code, shared = client.apply(thing("a", name="x"), "two")
    assert code == 200 and "f:name" in owners(shared)["two", "Apply"]["f:spec"]
    code, forced = client.apply(thing("a", name="z"), "three", force=True)
    assert code == 200 and forced["spec"]["name"] == "z"
    assert "f:name" not in owners(forced)["one", "Apply"]["f:spec"]
    assert ("two", "Apply") in owners(forced) and "f:name" not in owners(forced)["two", "Apply"]["f:spec"]


def test_what_is_no_longer_applied_goes_unless_another_manages_it(client: Client) -> None:
    client.apply(thing("a", name="x", plain=["1"], labels={"k": "v", "l": "w"}), "one")
    client.apply({**thing("a"), "spec": {"size": 1, "name": "x"}}, "two")
    code, found = client.apply(thing("a", labels={"l": "w"}), "one")
    assert code == 200, found
    assert found["spec"] == {"size": 1, "colour": "red", "name": "x", "labels": {"l": "w"}}


def test_lists_merge_by_their_kind(client: Client) -> None:
    parts = [{"name": "p", "note": "of one"}]
    client.apply(thing("a", parts=parts, names=["a", "b"], plain=["1", "2"]), "one")
    item = thing("a", parts=[{"name": "q", "value": 3}], names=["b", "c"])
    code, found = client.apply(item, "two")
    assert code == 200, found
    assert {one["name"]: one["value"] for one in found["spec"]["parts"]} == {"p": 7, "q": 3}
    assert sorted(found["spec"]["names"]) == ["a", "b", "c"]
    code, found = client.apply(thing("a", plain=["3"]), "three", force=True)
    assert found["spec"]["plain"] == ["3"]
    # One lets its entries go; what both have stays.
    _, found = client.apply(thing("a"), "one")
    assert [one["name"] for one in found["spec"]["parts"]] == ["q"]
    assert sorted(found["spec"]["names"]) == ["b", "c"] and found["spec"]["plain"] == ["3"]


def test_a_change_takes_a_field_from_who_applied_it(client: Client) -> None:
    client.apply(thing("a", name="x"), "one")
    path = client.things("a") + "?fieldManager=hand"
    _, found = client.ask("PATCH", path, {"spec": {"name": "y"}}, MERGE)
    assert owners(found)["hand", "Update"] == {"f:spec": {"f:name": {}}}
    assert "f:name" not in owners(found)["one", "Apply"]["f:spec"]
    assert client.apply(thing("a", name="x"), "one")[0] == 409
    assert client.apply(thing("a", name="x"), "one", force=True)[1]["spec"]["name"] == "x"
    # What nobody applies any more stays, when another has it.
    client.ask("PATCH", path, {"spec": {"labels": {"k": "v"}}}, MERGE)
    _, found = client.apply(thing("a"), "one")
    assert found["spec"] == {"size": 1, "colour": "red", "labels": {"k": "v"}}


def test_an_apply_states_what_it_is(client: Client) -> None:
    code, _ = client.ask("PATCH", client.things("a"), thing("a"), APPLY)
    assert code in (400, 422), "the field manager is missing"
    code, refused = client.apply({**thing("a"), "metadata": {"name": "other"}}, "one", path=client.things("a"))
    assert code == 400, refused
    made = client.create("b")
    stale = thing("b", metadata={"resourceVersion": made["metadata"]["resourceVersion"]}, size=2)
    assert client.apply(stale, "one", force=True)[0] == 200
    assert client.apply(thing("b", metadata=stale["metadata"], size=3), "one", force=True)[0] == 409


DEPLOYMENT: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "d"},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"a": "b"}},
        "template": {
            "metadata": {"labels": {"a": "b"}},
            "spec": {
                "containers": [
                    {
                        "name": "one",
                        "image": "i",
                        "ports": [{"containerPort": 1, "name": "x"}, {"containerPort": 2, "protocol": "UDP"}],
                        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                        "resources": {"limits": {"memory": "1024Mi", "cpu": "2000m"}, "requests": {"cpu": "0.5"}},
                    }
                ]
            },
        },
    },
}


def test_deployments_merge_by_the_keys_of_their_lists(client: Client) -> None:
    path = client.own("deployments", "d", "/apis/apps/v1")
    code, made = client.apply(DEPLOYMENT, "one", path=path)
    assert code == 200, made
    assert made["metadata"]["generation"] == 1
    [container] = made["spec"]["template"]["spec"]["containers"]
    # Quantities are written in one form, and defaults are there.
    assert container["resources"] == {"limits": {"memory": "1Gi", "cpu": "2"}, "requests": {"cpu": "500m"}}
    assert [port["protocol"] for port in container["ports"]] == ["TCP", "UDP"]
    change = json.loads(json.dumps(DEPLOYMENT))
    changed = change["spec"]["template"]["spec"]["containers"][0]
    changed["env"] = [{"name": "C", "value": "3"}]
    changed.pop("resources"), changed.pop("ports")
    del change["spec"]["replicas"]
    code, found = client.apply(change, "two", path=path)
    assert code == 200, found
    [container] = found["spec"]["template"]["spec"]["containers"]
    assert {one["name"]: one["value"] for one in container["env"]} == {"A": "1", "B": "2", "C": "3"}
    keys = owners(found)["one", "Apply"]["f:spec"]["f:template"]["f:spec"]["f:containers"]['k:{"name":"one"}']
    assert 'k:{"containerPort":1,"protocol":"TCP"}' in keys["f:ports"]
    # Replicas that another sets by hand are no longer those applied.
    client.ask("PATCH", path, {"spec": {"replicas": 5}}, MERGE)
    _, found = client.apply(change, "two", path=path)
    assert found["spec"]["replicas"] == 5
    _, found = client.apply(DEPLOYMENT, "one", path=path, force=True)
    assert found["spec"]["replicas"] == 2 and found["metadata"]["generation"] > made["metadata"]["generation"]
    change["spec"]["selector"]["matchLabels"] = {"a": "c"}
    change["spec"]["template"]["metadata"]["labels"] = {"a": "c"}
    assert client.apply(change, "two", force=True, path=path)[0] == 422, "selectors are fixed"


def test_what_the_schema_does_not_know_is_not_applied(client: Client) -> None:
    wrong = json.loads(json.dumps(DEPLOYMENT))
    wrong["spec"]["template"]["spec"]["nothing"] = 1
    path = client.own("deployments", "d", "/apis/apps/v1")
    code, refused = client.apply(wrong, "one", path=path)
    assert code >= 400 and "nothing" in refused["message"]


def test_addresses_of_services_are_given_and_fixed(client: Client) -> None:
    item = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "s"},
        "spec": {"selector": {"a": "b"}, "ports": [{"name": "x", "port": 80, "protocol": "TCP"}]},
    }
    path = client.own("services", "s")
    _, made = client.apply(item, "one", path=path)
    assert made["spec"]["clusterIP"].startswith("10.0.") and made["spec"]["type"] == "ClusterIP"
    _, again = client.apply(item, "one", path=path)
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    item["spec"] = {**made["spec"], "clusterIP": "None", "clusterIPs": ["None"]}
    assert client.apply(item, "one", force=True, path=path)[0] == 422


# Access.


@pytest.fixture
def limited(client: Client) -> Client:
    """A user with few rights in the namespace."""
    rules = [
        {"apiGroups": ["contract.test"], "resources": ["things"], "verbs": ["get", "list", "watch", "patch"]},
        {"apiGroups": ["contract.test"], "resources": ["things/status"], "verbs": ["patch"]},
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["mine"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", "patch"]},
    ]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "few"}, "rules": rules}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "few"}
    subjects = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": CONTROLLER}]
    binding = {**role, "kind": "RoleBinding", "roleRef": reference, "subjects": subjects}
    del binding["rules"]
    for kind, item in (("roles", role), ("rolebindings", binding)):
        code, answer = client.ask("POST", client.own(kind, root=RBAC), item)
        assert code == 200, answer
    return Client(client.server, CONTROLLER_TOKEN, client.namespace)


def test_only_what_a_role_allows_is_done(client: Client, limited: Client) -> None:
    client.create("a")
    allowed = [
        ("GET", limited.things("a"), None),
        ("GET", limited.things(), None),
        ("PATCH", limited.things("a"), {"spec": {"size": 2}}),
        ("PATCH", limited.things("a", "status"), {"status": {"phase": "x"}}),
        ("GET", limited.own("secrets") + "?fieldSelector=metadata.name=mine", None),
    ]
    refused = [
        ("DELETE", limited.things("a"), None),
        ("GET", "/apis/contract.test/v1/things", None),
        ("GET", limited.own("secrets"), None),
        ("GET", limited.own("secrets", "yours"), None),
        ("GET", limited.own("pods"), None),
        ("GET", limited.own("configmaps"), None),
        ("PUT", limited.things("a", "status"), thing("a")),
    ]
    # Roles are followed by a watch of the server's own.
    for _ in range(100):
        if limited.ask("GET", limited.things("a"))[0] == 200:
            break
    for method, path, body in allowed:
        assert limited.ask(method, path, body, MERGE)[0] == 200, (method, path)
    for method, path, body in refused:
        content = MERGE if method == "PATCH" else "application/json"
        code, answer = limited.ask(method, path, body, content)
        assert (code, answer["reason"]) == (403, "Forbidden"), (method, path)
    assert limited.ask("GET", limited.own("secrets", "mine"))[0] == 404
    # What an apply makes is created.
    assert limited.apply(thing("b"), "one")[0] == 403
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"x": "1"}}
    assert limited.apply(settings, "one", path=limited.own("configmaps", "c"))[0] == 200


def test_nobody_is_let_in_without_a_token_that_is_known(client: Client) -> None:
    stranger = Client(client.server, "no-such-token", client.namespace)
    assert stranger.ask("GET", stranger.things())[0] == 401


def test_what_is_served_is_told(client: Client) -> None:
    code, found = client.ask("GET", "/apis/apps/v1")
    assert code == 200 and "deployments" in {entry["name"] for entry in found["resources"]}
    code, found = client.ask("GET", GROUP)
    assert {"things", "things/status"} <= {entry["name"] for entry in found["resources"]}
    assert client.ask("GET", "/apis/not.there/v1")[0] == 404
    assert client.ask("GET", "/apis/contract.test/v1/namespaces/x/others")[0] == 404
