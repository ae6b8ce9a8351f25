"""SUITE=pull: our pulls beside bare downloads of the same objects, with as many threads, from the same S3 server.

Ours lists, signs, downloads, checks every object against the digest that the store tells, flushes it to the disk and
publishes the whole. The peers list and download to files, and do nothing of the rest: ``boto3`` with get_object,
``urllib3`` by signed URLs. One after the other in every round, on one core; the server has the other.

The server knows no digests but MD5. Those that S3 has beside it are handed to ours as if they had been told, in the
cases that are called after them.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import boto3
import urllib3
from botocore.config import Config
from rich.console import Console

from bench.comparison import OURS, Plan
from bench.machine import cores, pinned
from bench.peers.rclone_s3 import KEY, SECRET
from bench.processes import PeerFailed, Process
from bench.rows import Row, compare
from mmcore.model import ModelInfo
from mmcore.storage import DiskCache, Puller, StorageConfig
from mmcore.storage.digests import ALGORITHMS, Digest, begin
from mmcore.storage.remote import Blob
from mmcore.storage.s3 import S3Remote
from mmcore.storage.transfer import PART_BYTES, PullLimits

BUCKET: Final = "models"
THREADS: Final = PullLimits().threads
LARGE_BYTES: Final = 256 * 2**20
SMALL_COUNT: Final = 2000
SMALL_BYTES: Final = 10_000
#: With ``--quick``: this share of both.
QUICK_SHARE: Final = 10
PLACE: Final = Path("/dev/shm/mmcore-bench-pull")
_CHUNK: Final = 2**20


@dataclass(frozen=True, slots=True)
class Case:
    """A model in the bucket: its path, its bytes, what the throughput counts, and whether the server tells digests."""

    name: str
    objects: int
    size: int
    metric: str
    digests: bool = True
    algorithm: str = ""

    @property
    def amount(self) -> float:
        """What the seconds are divided into: megabytes, or objects."""
        return self.size / 1e6 if self.metric == "bandwidth" else self.objects


_Pull = Callable[[Case, Path], None]


def run(console: Console, plan: Plan) -> list[Row]:
    """Fill the bucket, pull in turns, compare the medians."""
    share = 1 if plan.duration_s >= 1 else QUICK_SHARE
    count = SMALL_COUNT // share
    cases = [
        Case("large", 1, LARGE_BYTES // share, "bandwidth"),
        *(Case(f"large-{name}", 1, LARGE_BYTES // share, "bandwidth", algorithm=name) for name in ALGORITHMS[:-1]),
        Case("large-unchecked", 1, LARGE_BYTES // share, "bandwidth", digests=False),
        Case("small", count, count * SMALL_BYTES, "objects"),
    ]
    cases = [case for case in cases if plan.wants_case(case.name)]
    rows: list[Row] = []
    for case in cases:
        with _server(digests=case.digests) as endpoint:
            rows += _measured(case, endpoint, plan, console)
    return rows


def _measured(case: Case, endpoint: str, plan: Plan, console: Console) -> list[Row]:
    client = _client(endpoint)
    client.create_bucket(Bucket=BUCKET)
    bare: dict[str, _Pull] = {"boto3": _Boto3(client), "urllib3": _Urllib3(client)}
    peers = {name: peer for name, peer in bare.items() if plan.wants_peer(name)}
    console.print(f"uploading {case.name}: {case.objects} objects, {case.size / 1e6:.0f} MB")
    _upload(client, case)
    ours = _Ours(endpoint, _digest(client, case) if case.algorithm else None)
    pulls: dict[str, _Pull] = {OURS: ours, **peers}
    seconds: dict[str, list[float]] = {name: [] for name in pulls}
    for _ in range(plan.rounds):
        for name, pull in pulls.items():
            seconds[name].append(_timed(name, pull, case))
    ours.puller.close()
    rates = {name: case.amount / statistics.median(found) for name, found in seconds.items()}
    return [compare(case.name, case.metric, rates[OURS], name, rates[name]) for name in peers]


def _timed(name: str, pull: _Pull, case: Case) -> float:
    """Seconds of one pull into an empty folder, whose files are counted afterwards."""
    folder = PLACE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()
    with pinned(cores()[1]):
        began = time.perf_counter()
        pull(case, folder)
        took = time.perf_counter() - began
    sizes = [path.stat().st_size for path in folder.rglob("part-*")]
    if (len(sizes), sum(sizes)) != (case.objects, case.size):
        raise PeerFailed(f"{name}: {len(sizes)} files of {sum(sizes)} bytes came of case {case.name}")
    shutil.rmtree(folder)
    return took


class _Ours:
    def __init__(self, endpoint: str, digest: Digest | None) -> None:
        self._digest = digest
        parameters = {
            "type": "s3", "endpoint_url": endpoint, "region": "us-east-1", "bucket": BUCKET,
            "access_key_id": KEY, "secret_access_key": SECRET,
        }  # fmt: skip
        self._key = json.dumps({"storage_params": parameters})
        self.puller = Puller(StorageConfig(None), DiskCache(PLACE, LARGE_BYTES * 4))

    def __call__(self, case: Case, folder: Path) -> None:
        self.puller.cache = DiskCache(folder, LARGE_BYTES * 4)
        find, digest = S3Remote.find, self._digest

        def told(remote: S3Remote, path: str) -> list[Blob]:
            return [replace(blob, digest=digest) for blob in find(remote, path)]

        with patch.object(S3Remote, "find", told) if digest is not None else nullcontext():
            self._pull(case)

    def _pull(self, case: Case) -> None:
        self.puller.pull(ModelInfo("", case.name, self._key))
        self.puller.cache.close()


class _Boto3:
    def __init__(self, client: Any) -> None:
        self._client = client

    def __call__(self, case: Case, folder: Path) -> None:
        _bare(self._client, case, folder, self._part)

    def _part(self, key: str, descriptor: int, start: int, stop: int) -> None:
        body = self._client.get_object(Bucket=BUCKET, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
        while chunk := body.read(_CHUNK):
            os.pwrite(descriptor, chunk, start)
            start += len(chunk)


class _Urllib3:
    def __init__(self, client: Any) -> None:
        self._client = client
        self._pool = urllib3.PoolManager(maxsize=THREADS)

    def __call__(self, case: Case, folder: Path) -> None:
        _bare(self._client, case, folder, self._part)

    def _part(self, key: str, descriptor: int, start: int, stop: int) -> None:
        url = self._client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key})
        headers = {"range": f"bytes={start}-{stop - 1}"}
        answer = self._pool.request("GET", url, headers=headers, preload_content=False)
        while chunk := answer.read1(_CHUNK):
            os.pwrite(descriptor, chunk, start)
            start += len(chunk)
        answer.release_conn()


def _bare(client: Any, case: Case, folder: Path, part: Callable[[str, int, int, int], None]) -> None:
    """List, and bring every part of every object to its file."""
    descriptors = []
    with ThreadPoolExecutor(THREADS) as threads:
        work = []
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{case.name}/"):
            for one in page["Contents"]:
                path = folder / one["Key"].rpartition("/")[2]
                if one["Size"] <= PART_BYTES:
                    work.append(threads.submit(_small, part, one["Key"], path, one["Size"]))
                    continue
                descriptors.append(os.open(path, os.O_CREAT | os.O_WRONLY))
                work += [
                    threads.submit(part, one["Key"], descriptors[-1], start, min(start + PART_BYTES, one["Size"]))
                    for start in range(0, one["Size"], PART_BYTES)
                ]
        for done in work:
            done.result()
    for descriptor in descriptors:
        os.close(descriptor)


def _small(part: Callable[[str, int, int, int], None], key: str, path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    part(key, descriptor, 0, size)
    os.close(descriptor)


def _digest(client: Any, case: Case) -> Digest:
    """Of the case's one object, as it was stored."""
    whole = begin(case.algorithm)
    for chunk in client.get_object(Bucket=BUCKET, Key=f"{case.name}/part-00000")["Body"].iter_chunks(_CHUNK):
        whole.update(chunk)
    return Digest(case.algorithm, whole.digest().hex())


def _upload(client: Any, case: Case) -> None:
    """The case's objects, with other bytes in each; large ones in parts of 8 MiB, as boto3 and the AWS tools do."""
    each = case.size // case.objects
    scratch = PLACE / "upload"
    scratch.parent.mkdir(parents=True, exist_ok=True)

    def put(number: int) -> None:
        client.put_object(Bucket=BUCKET, Key=f"{case.name}/part-{number:05d}", Body=os.urandom(each))

    if case.objects == 1:
        scratch.write_bytes(os.urandom(each))
        client.upload_file(str(scratch), BUCKET, f"{case.name}/part-00000")
        scratch.unlink()
        return
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(put, range(case.objects)))


def _client(endpoint: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, max_pool_connections=THREADS),
    )  # fmt: skip


@contextmanager
def _server(*, digests: bool) -> Iterator[str]:
    options = () if digests else ("--etag-hash", "")
    with Process("rclone", [sys.executable, "-m", "bench.peers.rclone_s3", *options], core=cores()[0]) as server:
        yield str(server.ready["s3"])
