"""What ModelMesh's tests promise of several instances, of ours: sizes, several models, errors, failed loads, copies.

README-mesh.md tells which of its cases is proved where.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
from mmcore.pb import model_mesh_pb2 as pb
from tests.etcds import Etcd, etcdctl
from tests.management import BROKEN, files
from tests.meshes import INFER, MODELS, WITHIN_S, Client, Load, Member, Mesh, name_of, until
from tests.serving import FAILING, Instances

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

#: ModelMesh's bound on an answer with 2 MB by way of another instance, in seconds.
LARGE_WITHIN_S = 2.0

#: Notes every attempt to load it, and is loaded only where the process's clock file is the one in its settings.
PARTICULAR = """
import os

class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("Y", "FP32", [-1])]

    def load(self, path, parameters):
        with open(parameters["attempts"], "a") as file:
            file.write(os.environ["CLOCK_OFF_FILE"] + "\\n")
        if os.environ["CLOCK_OFF_FILE"] != parameters["only"]:
            raise ValueError("the accelerator is missing")

    def predict(self, inputs):
        return {"Y": inputs["X"]}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    instances = Instances(folder)
    etcd = await asyncio.to_thread(Etcd(folder / "etcd").start)
    made = Mesh(instances, folder, etcd, 3)
    try:
        await made.start()
        yield made
    finally:
        await made.close()
        await asyncio.to_thread(instances.end)
        etcd.kill()


def question(name: str, values: Any, tensor: str = "X") -> bytes:
    parts = encode_infer_request(name, [(tensor, "FP32", np.asarray(values, np.float32))])
    return b"".join(map(bytes, parts)) if isinstance(parts, list) else bytes(parts)


async def error_of(client: Client, name: str, tensor: str = "X") -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await client.raw(INFER, question(name, [1.0], tensor))
    return raised.value.code().name, raised.value.details() or ""


async def test_two_megabytes_pass_by_way_of_another_instance(mesh: Mesh) -> None:
    holder, other, _ = mesh.members
    await mesh.place(2, holder)
    values = np.arange(500_000, dtype=np.float32)
    body = question(name_of(2), values)
    for _ in range(50):
        began = time.monotonic()
        answer = decode_infer_response(await other.client.raw(INFER, body))
        assert time.monotonic() - began < LARGE_WITHIN_S
        assert np.array_equal(answer.outputs[0].array(), values * 3)


async def test_a_connection_between_instances_that_breaks_in_the_middle_costs_no_answer(mesh: Mesh) -> None:
    holder, other, _ = mesh.members
    await mesh.place(2, holder)
    given = [np.arange(500_000, dtype=np.float32) + number for number in range(16)]
    passed = holder.door.sent_bytes
    asked = [asyncio.create_task(other.client.raw(INFER, question(name_of(2), values))) for values in given]
    await until(lambda: _is(holder.door.sent_bytes > passed + 1_000_000))
    await holder.door.cut()
    await holder.door.mend()
    for values, answer in zip(given, await asyncio.gather(*asked), strict=True):
        assert np.array_equal(decode_infer_response(answer).outputs[0].array(), values * 3)


async def _is(value: bool) -> bool:
    return value


async def test_several_models_of_one_request_may_be_at_several_instances(mesh: Mesh) -> None:
    for model, member in enumerate(mesh.members):
        await mesh.place(model, member)
    body = question("", [7.0])
    for member in mesh.members:
        headers = [("mm-model-id", name_of(model)) for model in range(3)]
        merged = decode_infer_response(await member.client.raw(INFER, body, metadata=headers))
        assert [one.array().tolist() for one in merged.outputs] == [[7.0], [14.0], [21.0]]


async def test_an_error_of_a_model_is_the_same_whichever_instance_is_asked_and_makes_no_copy(mesh: Mesh) -> None:
    a, _, _ = mesh.members
    await a.client.register("fails", files(mesh.files, "fails", FAILING))
    told = {await error_of(a.client, "fails", "INPUT0")}
    # Another may load it that does not know yet that there is a copy.
    await until(lambda: _all_tell(mesh, "fails", pb.ModelStatusInfo.LOADED))
    told |= {await error_of(member.client, "fails", "INPUT0") for member in mesh.members for _ in range(3)}
    ((code, text),) = told
    assert code == "INTERNAL"
    assert "seven is not a number I like" in text
    loads = [member.instance.log_text().count("loading model fails ") for member in mesh.members]
    assert sorted(loads) == [0, 0, 1]


async def _all_tell(mesh: Mesh, name: str, *states: int) -> bool:
    """Whether every instance tells that a model has copies in these states."""
    request = pb.GetStatusRequest(modelId=name)
    told = [await member.client.manage("getModelStatus", request, pb.ModelStatusInfo) for member in mesh.members]
    return all([copy.copyStatus for copy in status.modelCopyInfos] == list(states) for status in told)


async def test_a_model_that_one_instance_alone_can_load_is_answered_whichever_is_asked(mesh: Mesh) -> None:
    a, _, _ = mesh.members
    for number in range(12):
        member = mesh.members[number % len(mesh.members)]
        name = f"particular-{number}-{os.urandom(2).hex()}"  # of its own when the test is run again
        attempts = mesh.files / f"attempts-{name}"
        settings = f"parameters: {{attempts: {attempts}, only: {member.clock}}}"
        await a.client.register(name, files(mesh.files, name, PARTICULAR, settings=settings))
        for asked in mesh.members:
            answer = decode_infer_response(await asked.client.raw(INFER, question(name, [5.0])))
            assert answer.outputs[0].array().tolist() == [5.0]
        tried = attempts.read_text().split()
        # No instance tried twice what it could not do.
        assert len(tried) == len(set(tried)) <= len(mesh.members)


async def test_a_model_that_none_can_load_fails_with_its_cause_at_every_instance(mesh: Mesh) -> None:
    a, b, _ = mesh.members
    attempts = mesh.files / "attempts-none"
    settings = f"parameters: {{attempts: {attempts}, only: nowhere}}"
    await a.client.register("nobodys", files(mesh.files, "nobodys", PARTICULAR, settings=settings))
    for member in mesh.members:
        code, text = await error_of(member.client, "nobodys")
        assert code == "FAILED_PRECONDITION"
        assert "the accelerator is missing" in text
    assert 1 <= len(attempts.read_text().split()) <= len(mesh.members)

    async def told() -> bool:
        request = pb.GetStatusRequest(modelId="nobodys")
        status = await b.client.manage("getModelStatus", request, pb.ModelStatusInfo)
        return status.status == pb.ModelStatusInfo.LOADING_FAILED and "accelerator" in status.errors[0]

    await until(told)
    # It harms nobody else.
    for number in range(MODELS):
        assert await a.client.ask(number, number)


async def test_what_is_unregistered_leaves_nothing_behind(mesh: Mesh) -> None:
    a, b, c = mesh.members
    await a.client.register("brief", files(mesh.files, "brief", BROKEN))
    await error_of(b.client, "brief")
    await c.client.unregister("brief")

    async def gone() -> bool:
        kept = await asyncio.to_thread(
            etcdctl, "--endpoints", mesh.etcd.endpoint, "get", "--prefix", "--keys-only", "faults/"
        )
        known = [await member.client.models() for member in mesh.members]
        return "brief" not in kept and all("brief" not in one for one in known)

    await until(gone)
    for member in mesh.members:
        assert (await error_of(member.client, "brief"))[0] == "NOT_FOUND"


async def test_a_model_in_constant_use_is_loaded_by_others_too(mesh: Mesh) -> None:
    holder, other, _ = mesh.members
    await mesh.place(3, holder)
    load = Load(other.client, (3,))
    # Seen from one look of the upkeep to the next, which are ten seconds apart.
    await until(lambda: _copies(other, 3, 2), 2 * WITHIN_S)
    await load.stop()
    assert load.failures == []


async def _copies(member: Member, model: int, least: int) -> bool:
    return len(await member.client.locations(model)) >= least
