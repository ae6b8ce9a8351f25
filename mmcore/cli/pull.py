"""``mmcore pull``: a model's files from where a serving instance would pull them, into a folder."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import click

from mmcore import log
from mmcore.cli.tables import print_json
from mmcore.config import StorageSettings
from mmcore.model import ModelInfo
from mmcore.storage import DiskCache, Puller, StorageConfig
from mmcore.storage.progress import LogProgress


@click.command("pull")
@click.argument("places", metavar="[URI] DEST", nargs=-1, required=True)
@click.option("--key", metavar="KEY", help="Storage key; without a URI.")
@click.option("--path", metavar="PATH", help="The model's path there; without a URI.")
@click.option("--param", "params", metavar="NAME=VALUE", multiple=True, help="Storage parameter; repeat it.")
@click.option(
    "--storage-config",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar="MMCORE_STORAGE_CONFIG",
    show_envvar=True,
    help="Folder of JSON files, one for each storage key.",
)
@click.option(
    "--pvc-mounts",
    type=click.Path(file_okay=False, path_type=Path),
    default=str(StorageSettings().pvc_mounts),
    envvar="MMCORE_PVC_MOUNTS",
    show_default=True,
    show_envvar=True,
    help="Folder that volume claims are mounted in.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was pulled as JSON.")
def command(
    places: tuple[str, ...],
    key: str | None,
    path: str | None,
    params: tuple[str, ...],
    storage_config: Path | None,
    pvc_mounts: Path,
    as_json: bool,
) -> None:
    """Pull a model's files into the folder DEST, which must not be there yet.

    A URI is s3://BUCKET/PATH, gs://BUCKET/PATH, https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH, another https://
    or http://, pvc://CLAIM/PATH or a local path; else --path, with --key or the entry 'default', says where they are.
    """
    if len(places) > 2 or (len(places) == 2) == (path is not None):
        raise click.UsageError("give a URI and DEST, or --path (with --key) and DEST")
    stated = {name: value for name, _, value in (one.partition("=") for one in params)}
    model_key: dict[str, Any] = {"storage_params": stated}
    if key is not None:
        model_key["storage_key"] = key
    source = path if path is not None else _absolute(places[0])
    log.configure("info")
    puller = Puller(
        StorageConfig(storage_config, own_parameters=True),
        # Nothing is kept: its folder is never made.
        DiskCache(StorageSettings().cache),
        pvc_mounts=pvc_mounts,
        progress=Bar if sys.stderr.isatty() else LogProgress,
    )
    try:
        puller.pull_to(ModelInfo("", source, json.dumps(model_key)), destination := Path(places[-1]))
    finally:
        puller.close()
    if as_json:
        files = sorted(one for one in destination.rglob("*") if one.is_file())
        print_json(
            {
                "folder": str(destination),
                "files": [{"path": str(one.relative_to(destination)), "bytes": one.stat().st_size} for one in files],
            }
        )


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).absolute())


class Bar:
    """A bar on the terminal. Satisfies :class:`mmcore.storage.transfer.Progress`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            *(TextColumn("{task.description}"), BarColumn(), DownloadColumn()),
            *(TransferSpeedColumn(), TimeRemainingColumn()),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True))
        self._lock = threading.Lock()
        self._task: Any = None

    def started(self, what: str, files: int, total_bytes: int | None) -> None:
        """The files are known."""
        text = f"{what} and {files - 1} more" if files > 1 else what
        self._task = self._bar.add_task(text, total=total_bytes)
        self._bar.start()

    def received(self, count: int) -> None:
        """So many bytes more have come."""
        with self._lock:
            self._bar.advance(self._task, count)

    def ended(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()
