"""What the controller hears of vmodels while a list of them is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from mmcore.controller.mesh import Mesh
from mmcore.pb import cluster_pb2
from mmcore.pb import model_mesh_pb2 as pb

States = pb.ModelStatusInfo.ModelStatus


def status(state: Any) -> pb.VModelStatusInfo:
    return pb.VModelStatusInfo(
        status=pb.VModelStatusInfo.DEFINED,
        activeModelId="m-1",
        targetModelId="m-1",
        activeModelStatus=pb.ModelStatusInfo(status=state),
        owner="ksp",
    )


class Told(Mesh):
    """Its instance answers lists when it is let: the first at once, with nothing in it."""

    def __init__(self) -> None:
        self.changes: list[Collection[str] | None] = []
        super().__init__("team", self.changes.append)
        self.lists = 0
        self.listed_now, self.asked = asyncio.Event(), asyncio.Event()
        self.state = States.LOADING

    async def _call(self, path: str, request: Any, response: Any, *, timeout_s: float = 10.0) -> Any:
        if path.endswith("/setVModel"):
            return status(States.LOADING)
        if path.endswith("/deleteVModel"):
            return pb.DeleteVModelResponse()
        if path.endswith("/getVModelStatus"):
            return status(self.state)
        self.lists += 1
        if self.lists > 1:
            self.asked.set()
            await self.listed_now.wait()
        return cluster_pb2.ListVModelsResponse()


async def until(fits: Any) -> None:
    async with asyncio.timeout(20):
        while not fits():
            await asyncio.sleep(0.02)


async def test_a_list_that_takes_long_keeps_nobody_waiting() -> None:
    mesh = Told()
    mesh.set_addresses(["127.0.0.1:1"])
    try:
        await until(lambda: mesh.listed)
        assert mesh.changes == [None]
        # As many in motion as are only listed make the second list due at once.
        for number in range(40):
            await mesh.set_vmodel(pb.SetVModelRequest(vModelId=f"other-{number}"))
        await asyncio.wait_for(mesh.asked.wait(), 20)
        for number in range(40):
            await mesh.delete_vmodel(f"other-{number}", "ksp")
        await mesh.set_vmodel(pb.SetVModelRequest(vModelId="m"))
        mesh.state = States.LOADED
        await until(lambda: mesh.vmodels["m"].activeModelStatus.status == States.LOADED)
        assert ["m"] in mesh.changes
        # The list comes at last; it was made before, and takes nothing back.
        mesh.listed_now.set()
        await until(lambda: mesh.lists > 2 or mesh.asked.is_set())
        await asyncio.sleep(0)
        assert mesh.vmodels.keys() == {"m"}
        assert mesh.vmodels["m"].activeModelStatus.status == States.LOADED
    finally:
        await mesh.close()
