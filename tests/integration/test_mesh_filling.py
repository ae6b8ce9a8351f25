"""An instance that joins is given what others have no room for, before it is ready; what is used stays where it is."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from pathlib import Path

import pytest

from mmcore.transport import Channel
from tests.integration.test_mesh import ask, locations, name_of, register, until
from tests.serving import IDENTITY, Instance, Serve, command, write_model

pytestmark = pytest.mark.slow

MODELS = 12
FIT = 8


async def held(channel: Channel, instance: Instance) -> set[int]:
    """The models that an instance has a loaded copy of."""
    name = str(instance.ready["instance"])
    return {number for number in range(MODELS) if name in await locations(channel, number)}


async def test_a_new_instance_is_filled_before_it_is_ready_and_nothing_used_goes_for_it(
    serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(MODELS):
        write_model(folder, name_of(number), IDENTITY.replace("DATATYPE", "FP32"), settings="size_bytes: 10MiB")
    registry = f"sqlite:{tmp_path / 'registry.db'}"
    flags = ("--peer-port", "0", "--registry", registry, "--model-cache", tmp_path / "pulled")
    first = serve(None, *flags, "--capacity", f"{FIT * 10 + 5}MiB")
    channel = Channel(first.grpc)
    for number in range(MODELS):
        await register(channel, folder, number)
        await ask(channel, number)

    async def settled() -> bool:
        return len(await held(channel, first)) == FIT

    await until(settled)
    kept = await held(channel, first)
    began = time.monotonic()
    second = await asyncio.to_thread(serve, None, *flags, "--capacity", "1GiB")
    # At its ready line, and not after somebody asked for them.
    other = Channel(second.grpc)
    assert await held(other, second) == set(range(MODELS)) - kept
    assert await held(other, first) == kept
    assert time.monotonic() - began < 25
    # Whichever is asked tells what each is now, and which one leads.
    for target in (first, second):
        listed = subprocess.run(
            command("status", "--target", target.grpc, "--json"), capture_output=True, text=True, timeout=30, check=True
        )
        told = {one["id"]: one for one in json.loads(listed.stdout)}
        assert {one: told[one]["models"] for one in told} == {
            first.ready["instance"]: FIT, second.ready["instance"]: MODELS - FIT
        }  # fmt: skip
        assert sum(one["leader"] for one in told.values()) == 1
        assert [one["id"] for one in told.values() if one["asked"]] == [target.ready["instance"]]
    # The room of a third one is for what is used and nowhere held: there is nothing of that.
    third = await asyncio.to_thread(serve, None, *flags, "--capacity", "1GiB")
    assert await held(other, third) == set()
    # What the second had is loaded again where there is room when it is lost; the first one has none.
    second.process.kill()

    async def again() -> bool:
        return await held(channel, third) == set(range(MODELS)) - kept

    await until(again)
    assert await held(channel, first) == kept
    for one in (channel, other):
        await one.close()
