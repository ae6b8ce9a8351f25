"""A mesh under faults: etcd and instances stopped, killed, wiped, cut off, slow, restarted, with clocks that are wrong.

The tests share one mesh and leave it whole. In every one of them each request carries a number of its own and each
answer is checked to be of that model to that number; a registration that was acknowledged is known to all at the end.
What README-mesh.md lists is proved here and in the tests that it names.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from mmcore._ext.v2codec import decode_infer_response
from mmcore.errors import RpcError, Status
from mmcore.pb import inference_pb2
from mmcore.pb import model_mesh_pb2 as pb
from mmcore.transport import Channel, ClientStream
from tests.etcds import Etcd
from tests.management import SLOW_LOAD, files
from tests.meshes import CALLERS, MODELS, PACE_S, WITHIN_S, Client, Load, Member, Mesh, Registrar, name_of, until
from tests.serving import Instances

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

#: An instance that hangs or is cut off is found out within this time; twice, where one after the other is asked.
FOUND_OUT_S = 10.0
#: A write is refused within this time when the registry is away.
PROMPTLY_S = 5.0
#: Clocks are off by this much to either side: by more than anything that is timed in a test.
OFF_S = 1200.0
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"

#: Multiplies by FACTOR; its load ends when the file named in its settings exists.
SLOW_SCALE = SLOW_LOAD.replace('inputs["X"]', 'inputs["X"] * FACTOR')


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    instances = Instances(folder)
    etcd = await asyncio.to_thread(Etcd(folder / "etcd").start)
    made = Mesh(instances, folder, etcd, 3)
    # None of the clocks agree, in any of the tests.
    for member, off_s in zip(made.members, (0.0, OFF_S, -OFF_S), strict=True):
        member.set_clock(off_s)
    try:
        await made.start()
        request = pb.SetVModelRequest(vModelId="alias", targetModelId=name_of(3))
        await made.members[0].client.manage("setVModel", request, pb.VModelStatusInfo)
        yield made
    finally:
        await made.close()
        await asyncio.to_thread(instances.end)
        etcd.kill()


async def refused(client: Client) -> None:
    """A registration is refused, in time and as what it is."""
    began = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await client.register("refused", pb.ModelInfo(type="python", path="/nowhere"))
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began < PROMPTLY_S


async def test_an_instance_that_hangs_is_found_out_and_its_requests_are_answered_by_others(mesh: Mesh) -> None:
    a, b, c = mesh.members
    await mesh.place(0, a, b)
    await mesh.place(1, a)
    load = Load(c.client, (0, 1))
    await load.more(100)
    a.instance.signal(signal.SIGSTOP)
    try:
        await load.more(300)
        assert load.slowest_s() < FOUND_OUT_S
        since = time.monotonic()
        await load.more(200)
        assert load.slowest_s(since) < FOUND_OUT_S / 4
    finally:
        a.instance.signal(signal.SIGCONT)
    await load.stop()
    assert load.failures == []
    await mesh.whole()


async def test_a_slow_way_to_one_holder_is_left_to_the_other(mesh: Mesh) -> None:
    a, b, c = mesh.members
    await mesh.place(0, a, b)
    a.door.delay_s = 0.3
    load = Load(c.client, (0,))
    try:
        await load.more(50)
        since = time.monotonic()
        await load.more(300)
        slow = sum(took >= a.door.delay_s for took, at in load.times if at >= since)
        assert slow < 30
    finally:
        a.door.delay_s = 0.0
        await load.stop()
    assert load.failures == []


async def test_without_etcd_inference_goes_on_models_load_and_what_a_dead_instance_had_is_loaded_again(
    mesh: Mesh,
) -> None:
    a, b, c = mesh.members
    await mesh.place(2, c)
    cold = [await mesh.register(a.client) for _ in mesh.members]
    await mesh.whole()
    load = Load(Client(a.address, b.address))
    direct = Load(Client(c.address, a.address))
    await load.more(100)
    await asyncio.to_thread(mesh.etcd.stop)
    for name, member in zip(cold, mesh.members, strict=True):
        assert await member.client.ask(0, 7, name=name)
    await asyncio.gather(*(refused(member.client) for member in mesh.members))
    c.instance.process.kill()
    await c.ended()
    for member in (a, b):
        for number in range(MODELS):
            assert await member.client.ask(number, number)
    await load.more(100)
    await direct.more(100)
    await asyncio.to_thread(mesh.etcd.start)
    await until(lambda: _registers(mesh, a))
    await c.start(mesh.serve)
    await mesh.whole()
    for one in (load, direct):
        await one.stop()
    # Nothing that went through the others was lost; of those that were at the dead one itself, those that it had.
    assert load.failures == []
    assert len(direct.failures) <= CALLERS
    assert all("UNAVAILABLE" in failure for failure in direct.failures)


async def _registers(mesh: Mesh, member: Member) -> bool:
    await mesh.register(member.client)
    return True


async def test_an_etcd_that_comes_back_empty_gets_back_all_that_was_acknowledged(mesh: Mesh) -> None:
    _, b, _ = mesh.members
    load = Load(Client(*(member.address for member in mesh.members)))
    registrar = Registrar(mesh, b.client)
    known = len(mesh.registered)
    await until(lambda: _more(mesh, known + 5))
    await asyncio.to_thread(mesh.etcd.wipe)
    await until(lambda: _is(bool(registrar.refused)))
    await load.more(100)
    await asyncio.to_thread(mesh.etcd.start)
    known = len(mesh.registered)
    await until(lambda: _more(mesh, known + 5))
    await registrar.stop()
    await mesh.whole()
    for member in mesh.members:
        assert await member.client.alias("alias") == name_of(3)
    await load.stop()
    assert load.failures == []


async def _more(mesh: Mesh, count: int) -> bool:
    return len(mesh.registered) >= count


async def _is(value: bool) -> bool:
    return value


async def test_an_instance_cut_off_from_etcd_and_the_others_answers_what_it_is_asked_and_catches_up(
    mesh: Mesh,
) -> None:
    a, b, c = mesh.members
    await mesh.place(4, c)
    await mesh.place(5, a)
    gone = await mesh.register(b.client)
    await mesh.whole()
    inside, outside = Load(c.client), Load(Client(a.address, b.address))
    registrar = Registrar(mesh, a.client)
    await inside.more(50)
    c.etcd.silence()
    c.door.silence()
    for member in (a, b):
        member.door.shut_out(c.pid)
    cut_off = c.id
    await inside.more(200)
    await until(lambda: _knows_no_more(a, cut_off))
    await refused(c.client)
    await b.client.unregister(gone)
    mesh.registered.discard(gone)
    await inside.more(50)
    await outside.more(50)
    for member in mesh.members:
        await member.door.mend()
        await member.etcd.mend()
    await mesh.whole()
    for one in (inside, outside):
        await one.stop()
        assert one.slowest_s() < 2 * FOUND_OUT_S
    assert outside.failures == []
    # What was on its way when it was cut off from both others may have run at two of them: that is once too often.
    assert len(inside.failures) <= CALLERS
    assert all("UNAVAILABLE connection closed" in failure for failure in inside.failures)
    await registrar.stop()
    assert registrar.refused == []
    await mesh.whole()
    for member in mesh.members:
        assert gone not in await member.client.models()


async def _knows_no_more(member: Member, instance: str) -> bool:
    return instance not in await member.client.instances()


async def test_no_request_fails_while_all_instances_are_restarted_one_after_the_other(mesh: Mesh) -> None:
    load = Load(Client(*(member.address for member in mesh.members)))
    await load.more(100)
    quiet, leaving, starting = [], [], []
    for member in mesh.members:
        # A clock that is set back must not keep an instance from handing over what it has.
        member.set_clock(-2 * OFF_S)
        began_at = time.monotonic()
        await load.more(100)
        told_at = time.monotonic()
        member.instance.signal(signal.SIGTERM)
        assert await member.ended() == 0
        ended_at = time.monotonic()
        assert "Traceback" not in member.instance.log_text()
        await member.start(mesh.serve)
        quiet.append((began_at, told_at))
        leaving.append((told_at, ended_at))
        starting.append((ended_at, time.monotonic()))
        await load.more(100)
    await load.stop()
    assert load.failures == []
    times = ", ".join(
        f"{1000 * load.p99_s(*windows):.1f} ms {what}"
        for what, windows in (
            *(("while nothing happens", quiet), ("while an instance leaves", leaving), ("while one starts", starting)),
        )
    )
    print(f"99 of a hundred answers take no longer than {times}")
    # None of them was there from the beginning: what they know they have from etcd.
    await mesh.whole()


async def test_no_request_waits_for_a_load_while_an_instance_under_load_leaves(mesh: Mesh) -> None:
    """Its copies answer, whoever is asked, until those that are to follow them are loaded."""
    leaving, *others = mesh.members
    release = mesh.files / "release"
    release.touch()
    hot = (MODELS, MODELS + 1, MODELS + 2)
    for model in hot:
        source = SLOW_SCALE.replace("FACTOR", str(model + 1))
        info = files(mesh.files, name_of(model), source, settings=f"parameters: {{release: {release}}}")
        await leaving.client.register(name_of(model), info)
        await mesh.place(model, leaving)
    release.unlink()
    # A caller of each model through each instance: one whose request waited for a load would answer no more.
    clients = [Client(member.address, other.address) for member in mesh.members for other in others[:1]]
    loads = [Load(client, (model,), callers=1) for client in clients for model in hot]
    try:
        await asyncio.gather(*(load.more(20) for load in loads))
        leaving.instance.signal(signal.SIGTERM)
        await until(lambda: _are_coming(others[0], hot))
        await asyncio.gather(*(load.more(20) for load in loads))
    finally:
        release.touch()
    assert await leaving.ended() == 0
    await asyncio.gather(*(load.more(20) for load in loads))
    for load in loads:
        await load.stop()
        assert load.failures == []
    await leaving.start(mesh.serve)
    for model in hot:
        await others[0].client.unregister(name_of(model))
    await mesh.whole()


async def _are_coming(member: Member, models: tuple[int, ...]) -> bool:
    """Whether a load of each of these models is under way."""
    return all([await _loading_at(member, model) for model in models])


async def _loading_at(member: Member, model: int) -> set[str]:
    """The instances that load a model, as one tells."""
    request = pb.GetStatusRequest(modelId=name_of(model))
    status = await member.client.manage("getModelStatus", request, pb.ModelStatusInfo)
    return {copy.location for copy in status.modelCopyInfos if copy.copyStatus == pb.ModelStatusInfo.LOADING}


#: Kills its process when the file named in its settings exists, which goes with it.
DEADLY = SLOW_LOAD.replace(
    "    def predict",
    """        import signal

        os.unlink(parameters["release"])
        os.kill(os.getpid(), signal.SIGKILL)

    def predict""",
)


async def test_a_model_that_kills_whoever_loads_it_kills_two_instances_and_no_more(mesh: Mesh) -> None:
    deadly, name = 2 * MODELS, name_of(2 * MODELS)
    release = mesh.files / "kill"
    info = files(mesh.files, name, DEADLY, settings=f"parameters: {{release: {release}}}")
    await mesh.members[0].client.register(name, info)
    asked: list[asyncio.Task[bool]] = []

    async def is_coming() -> bool:
        """Whether it is being loaded: for the request that has lost one instance by that, or else for a new one."""
        if not asked or asked[-1].done():
            asked.append(asyncio.create_task(_alive(mesh)[0].client.ask(deadly, 1)))
        return await _is_coming_alive(mesh, deadly)

    for count in (1, 2):
        await until(is_coming)
        release.touch()
        await until(lambda count=count: _is(len(_alive(mesh)) == len(mesh.members) - count))
    outcomes = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), WITHIN_S)
    assert all(isinstance(outcome, grpc.aio.AioRpcError) for outcome in outcomes)
    (left,) = _alive(mesh)
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError, match="2 instances ended while they loaded the model") as raised:
            await left.client.ask(deadly, 1)
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    status = await left.client.manage("getModelStatus", pb.GetStatusRequest(modelId=name), pb.ModelStatusInfo)
    assert "it is not loaded again for" in status.errors[0]
    # It harms no other model.
    for number in range(MODELS):
        assert await left.client.ask(number, number)
    await left.client.unregister(name)
    await asyncio.gather(*(member.start(mesh.serve) for member in mesh.members if member is not left))
    await mesh.whole()


def _alive(mesh: Mesh) -> list[Member]:
    return [member for member in mesh.members if member.instance.process.poll() is None]


async def _is_coming_alive(mesh: Mesh, model: int) -> bool:
    """Whether an instance that has not ended is loading it, as all of those tell."""
    alive = _alive(mesh)
    ids = {member.id for member in alive}
    return all([ids & await _loading_at(member, model) for member in alive])


class Talk:
    """A stream of requests for one model, each with its number as its id; the answers are checked as they come.

    Attributes:
        sent, answered: how many requests, and answers, each of which was for the next request and right.
        status: the stream's, once it has ended.
    """

    def __init__(self, member: Member, model: int) -> None:
        self._channel = Channel(member.address)
        self._model = model
        self._stopped = False
        self.sent = self.answered = 0
        self.status: Status | None = None
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        stream = await self._channel.stream(STREAM_INFER, timeout_s=3 * WITHIN_S)
        sending = asyncio.create_task(self._send(stream))
        try:
            async for message in stream:
                answer = inference_pb2.ModelStreamInferResponse.FromString(message)
                assert answer.error_message == ""
                assert answer.infer_response.id == str(self.answered)
                found = decode_infer_response(answer.infer_response.SerializeToString()).outputs[0].array().tolist()
                assert found == [self.answered * (self._model + 1)]
                self.answered += 1
            self.status = Status.OK
        except RpcError as error:
            self.status = error.status
        finally:
            sending.cancel()
            await asyncio.wait([sending])
            await self._channel.close()

    async def _send(self, stream: ClientStream) -> None:
        tensor = inference_pb2.ModelInferRequest.InferInputTensor(name="X", datatype="FP32", shape=[1])
        while not self._stopped:
            tensor.contents.fp32_contents[:] = [float(self.sent)]
            request = inference_pb2.ModelInferRequest(
                model_name=name_of(self._model), id=str(self.sent), inputs=[tensor]
            )
            await stream.send(request.SerializeToString())
            self.sent += 1
            await asyncio.sleep(PACE_S)
        await stream.end()

    async def more(self, answers: int) -> None:
        """Wait until so many more requests were answered."""
        wanted = self.answered + answers
        await until(lambda: _is(self.answered >= wanted or self._task.done()))
        assert self.answered >= wanted, self._task

    async def ended(self) -> Status | None:
        """How it has ended, which it does soon."""
        await asyncio.wait_for(self._task, WITHIN_S)
        return self.status

    async def stop(self) -> None:
        """End it, when all is answered."""
        self._stopped = True
        assert await self.ended() is Status.OK
        assert self.answered == self.sent


async def test_streams_go_on_when_the_holder_is_killed_or_leaves_and_end_with_their_own_instance(mesh: Mesh) -> None:
    """Each request is answered once and rightly, in its turn; none is answered with an error."""
    holder, asked, other = mesh.members
    await mesh.place(6, holder)
    talks = [Talk(asked, 6) for _ in range(4)]
    await asyncio.gather(*(talk.more(50) for talk in talks))
    holder.instance.signal(signal.SIGTERM)
    await asyncio.gather(*(talk.more(50) for talk in talks))
    assert await holder.ended() == 0
    await asyncio.gather(*(talk.more(50) for talk in talks))
    await mesh.place(6, other, among=(asked, other))
    other.instance.process.kill()
    await asyncio.gather(*(talk.more(50) for talk in talks))
    await talks[0].stop()
    await other.ended()
    await holder.start(mesh.serve)
    # Those that would go on for ever are told to begin anew elsewhere.
    asked.instance.signal(signal.SIGTERM)
    assert {await talk.ended() for talk in talks[1:]} == {Status.UNAVAILABLE}
    assert await asked.ended() == 0
    again = Talk(holder, 6)
    await again.more(20)
    await again.stop()
    await asyncio.gather(*(member.start(mesh.serve) for member in (asked, other)))
