"""A registry's store in a SQLite file, for the processes of one machine.

Two threads, each with a connection of its own: one makes transactions, the other follows the log of changed keys.
SQLite tells cheaply whether another connection has committed (``PRAGMA data_version``, a look at shared memory). The
follower asks that 50 times a second, and reads only when one has.

A lease belongs to a process. It expires by the machine's monotonic clock, which all of its processes share, or as soon
as any of them sees that the process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from mmcore.errors import Unavailable
from mmcore.registry.process_identity import is_running, this_process
from mmcore.registry.store import Changes, Compacted, Entry, Fence, LeaseGone, NotLeader, Outcome, Write, is_same

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Changes that are remembered; who is further behind takes a snapshot.
LOG_LENGTH: Final = 100_000
#: Between two looks for changes, and two for leases whose processes are gone.
POLL_S: Final = 0.02
REAP_S: Final = 0.5
#: How long a transaction waits for those of other processes.
BUSY_S: Final = 2.0
#: Keys in one page of a snapshot: some milliseconds of the loop's time.
PAGE: Final = 2000

#: After so long without a change the follower returns to the loop, to see whether it is still wanted.
_LOOK_UP_S: Final = 1.0

# A transaction's version is that of its last row in the log. The lease of an entry is 0 where it has none.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, value BLOB NOT NULL,
    version INTEGER NOT NULL, created INTEGER NOT NULL, lease INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS leased ON entries (lease) WHERE lease != 0;
CREATE TABLE IF NOT EXISTS log (version INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS leases (
    id INTEGER PRIMARY KEY AUTOINCREMENT, process TEXT NOT NULL, ttl_s REAL NOT NULL, renewed_at REAL NOT NULL
);
"""


class SqliteStore:
    """See :class:`mmcore.registry.store.Store`. Used by one event loop; other processes have their own."""

    def __init__(self, path: Path) -> None:
        self._writer = _Database(path)
        self._follower = _Database(path)
        self._reaper: asyncio.Task[None] | None = None
        #: Readable when the follower is to look now: this process has committed, or nobody follows any more.
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    async def connect(self) -> None:
        """Open the file, made where there is none."""
        await self._writer.run(lambda connection: None)
        self._reaper = asyncio.create_task(self._reap(), name="registry leases")

    async def read(self, key: str) -> Entry | None:
        """What has been committed by whatever process."""
        return await self._writer.run(partial(_entry, key=key))

    async def transact(
        self, expected: Mapping[str, Entry | None], writes: Sequence[Write], fence: Fence | None = None
    ) -> Outcome:
        """One transaction; one without writes holds up nobody."""

        def run(connection: sqlite3.Connection) -> Outcome:
            with _transaction(connection, writes=bool(writes)):
                if fence is not None:
                    held = _entry(connection, fence.key)
                    if held is None or held.created != fence.created:
                        raise NotLeader("this instance is not the leader any more")
                current = {key: _entry(connection, key) for key in expected}
                if not all(is_same(current[key], entry) for key, entry in expected.items()):
                    return Outcome(False, _version(connection), current)
                for lease in {write.lease for write in writes if write.lease}:
                    if connection.execute("SELECT 1 FROM leases WHERE id = ?", (lease,)).fetchone() is None:
                        raise LeaseGone
                _write(connection, writes)
                return Outcome(True, _version(connection), {})

        outcome = await self._writer.run(run)
        os.eventfd_write(self._bell, 1)
        return outcome

    async def create_missing(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """In one transaction."""

        def run(connection: sqlite3.Connection) -> None:
            with _transaction(connection, writes=True):
                _write(connection, [Write(*entry) for entry in entries if _entry(connection, entry[0]) is None])

        await self._writer.run(run)

    async def snapshot(self) -> AsyncGenerator[Changes, None]:
        """Pages, each as of when it is read; what changes meanwhile comes again with the changes."""
        version = await self._follower.run(_version)
        last: str | None = ""
        while last is not None:
            entries = await self._follower.run(partial(_page, after=last))
            yield Changes(version, entries)
            last = entries[-1][0] if len(entries) == PAGE else None

    async def changes(self, after: int) -> AsyncGenerator[Changes, None]:
        """From the log of keys, each with its latest entry."""
        stop = threading.Event()
        await self._follower.run(partial(_since, after=after))
        yield Changes(after)
        try:
            while True:
                changes = await self._follower.run(partial(_next_since, after=after, bell=self._bell, stop=stop))
                if changes is not None:
                    after = changes.version
                    yield changes
        finally:
            stop.set()
            os.eventfd_write(self._bell, 1)

    async def grant(self, ttl_s: float) -> int:
        """A row with this process's identity."""
        process = this_process()

        def run(connection: sqlite3.Connection) -> int:
            row = (process, ttl_s, time.monotonic())
            cursor = connection.execute("INSERT INTO leases (process, ttl_s, renewed_at) VALUES (?, ?, ?)", row)
            return cursor.lastrowid or 0

        return await self._writer.run(run)

    async def renew(self, lease: int) -> bool:
        """Unless somebody has deleted the row."""

        def run(connection: sqlite3.Connection) -> bool:
            row = (time.monotonic(), lease)
            return connection.execute("UPDATE leases SET renewed_at = ? WHERE id = ?", row).rowcount > 0

        return await self._writer.run(run)

    async def revoke(self, lease: int) -> None:
        """As if it had expired."""
        await self._writer.run(partial(_revoke, lease=lease))

    async def close(self) -> None:
        """Close both connections."""
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.wait([self._reaper])
        await self._writer.close()
        await self._follower.close()
        os.close(self._bell)

    async def _reap(self) -> None:
        """End leases that expired, and those of processes that are gone."""
        while True:
            await asyncio.sleep(REAP_S)
            with contextlib.suppress(Unavailable):
                await self._writer.run(_reap)


class _Database:
    """One connection to the file, in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._connection: sqlite3.Connection | None = None
        self._inode = 0

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The result of ``work`` in the thread.

        Raises:
            Unavailable: SQLite refused it, or the file has been replaced by another.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    async def close(self) -> None:
        """Close the connection and end the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    # In the thread.

    def _check(self) -> None:
        """See that the file that is open is the one that others open."""
        try:
            inode = self._path.stat().st_ino
        except FileNotFoundError:
            inode = 0
        if inode != self._inode:
            self._close()
            raise Unavailable(f"the registry's file {self._path} was replaced")

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._connection is None:
                self._connection = self._open()
            else:
                self._check()
            return work(self._connection)
        except (sqlite3.Error, OSError) as error:
            self._close()
            raise Unavailable(f"the registry's file {self._path}: {error}") from None

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Keys of models may hold secrets: for this user alone.
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
        self._inode = self._path.stat().st_ino
        _to_wal(connection)
        # A crash of the machine may cost the last transactions, never the file; one of a process costs nothing.
        connection.execute("PRAGMA synchronous = NORMAL")
        with _transaction(connection, writes=True):
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _to_wal(connection: sqlite3.Connection) -> None:
    """Have readers and the writer not wait for each other. For other processes that do this SQLite itself does not."""
    give_up_at = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() >= give_up_at:
                raise
            time.sleep(POLL_S)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, *, writes: bool) -> Generator[None, None, None]:
    connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'log'").fetchone()
    return row[0] if row else 0


def _entry(connection: sqlite3.Connection, key: str) -> Entry | None:
    row = connection.execute("SELECT value, version, created FROM entries WHERE key = ?", (key,)).fetchone()
    return Entry.of(*row) if row else None


def _page(connection: sqlite3.Connection, after: str) -> list[tuple[str, Entry]]:
    query = "SELECT key, value, version, created FROM entries WHERE key > ? ORDER BY key LIMIT ?"
    rows = connection.execute(query, (after, PAGE))
    return [(key, Entry.of(value, version, created)) for key, value, version, created in rows]


def _write(connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
    version = 0
    for write in writes:
        version = connection.execute("INSERT INTO log (key) VALUES (?)", (write.key,)).lastrowid or 0
        if write.value is None:
            connection.execute("DELETE FROM entries WHERE key = ?", (write.key,))
        else:
            connection.execute(
                "INSERT INTO entries (key, value, version, created, lease) VALUES (?1, ?2, ?3, ?3, ?4) "
                "ON CONFLICT (key) DO UPDATE SET value = ?2, version = ?3, lease = ?4",
                (write.key, write.value, version, write.lease),
            )
    if writes:
        connection.execute("DELETE FROM log WHERE version <= ?", (version - LOG_LENGTH,))


def _since(connection: sqlite3.Connection, after: int) -> Changes | None:
    """What has changed since a version; None when nothing has."""
    with _transaction(connection, writes=False):
        version = _version(connection)
        oldest = connection.execute("SELECT min(version) FROM log").fetchone()[0]
        if after > version or (after < version and after + 1 < oldest):
            raise Compacted
        query = (
            "SELECT log.key, value, entries.version, created FROM log LEFT JOIN entries USING (key) "
            "WHERE log.version > ? ORDER BY log.version"
        )
        rows = {key: values for key, *values in connection.execute(query, (after,))}
    if not rows:
        return None
    entries = [(key, Entry.of(*values)) for key, values in rows.items() if values[0] is not None]
    return Changes(version, entries, [key for key, values in rows.items() if values[0] is None])


def _next_since(connection: sqlite3.Connection, after: int, bell: int, stop: threading.Event) -> Changes | None:
    """Wait for changes; None when there have been none for a while."""
    look_up_at = time.monotonic() + _LOOK_UP_S
    rings = select.poll()
    rings.register(bell, select.POLLIN)
    seen = -1
    while True:
        committed = connection.execute("PRAGMA data_version").fetchone()[0]
        if committed != seen and (changes := _since(connection, after)) is not None:
            return changes
        seen = committed
        if rings.poll(POLL_S * 1e3):
            os.eventfd_read(bell)
        if stop.is_set() or time.monotonic() >= look_up_at:
            return None


def _dead(connection: sqlite3.Connection) -> list[int]:
    """The leases that have expired, or whose processes are gone."""
    now = time.monotonic()
    rows = connection.execute("SELECT id, process, ttl_s, renewed_at FROM leases").fetchall()
    return [lease for lease, process, ttl_s, renewed_at in rows if now > renewed_at + ttl_s or not is_running(process)]


def _reap(connection: sqlite3.Connection) -> None:
    """End the leases that are dead; asked for before and within the transaction, since it is seldom needed."""
    if _dead(connection):
        with _transaction(connection, writes=True):
            for lease in _dead(connection):
                _end(connection, lease)


def _revoke(connection: sqlite3.Connection, lease: int) -> None:
    with _transaction(connection, writes=True):
        _end(connection, lease)


def _end(connection: sqlite3.Connection, lease: int) -> None:
    keys = connection.execute("SELECT key FROM entries WHERE lease = ? AND lease != 0", (lease,)).fetchall()
    _write(connection, [Write(key, None) for (key,) in keys])
    connection.execute("DELETE FROM leases WHERE id = ?", (lease,))
