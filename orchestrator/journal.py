"""What must outlive the orchestrator: epochs, requests, who carries them, their tokens and ends. SQLite in WAL mode.

The write-ahead log is flushed to the system at every commit and to the disk only now and then: what was committed
outlives the process, and after a loss of power the file is whole, though its last moments may be missing.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, assert_never

import msgspec

from edgellm.orchestrator.core.values import FinishReason, NodeId, RequestId, RequestSpec, RequestStats, SampledToken
from edgellm.orchestrator.deadline import LastingDeadline

SCHEMA_VERSION = 2
BUSY_TIMEOUT_S = 1.0
_SCHEMA = """
CREATE TABLE bundle (sha256 TEXT NOT NULL, epoch INTEGER NOT NULL);
CREATE TABLE requests (id TEXT PRIMARY KEY, accepted BLOB NOT NULL, nodes BLOB, ended BLOB, ended_unix_s REAL);
CREATE TABLE tokens (
  id TEXT NOT NULL, position INTEGER NOT NULL, token BLOB NOT NULL, PRIMARY KEY (id, position)
) WITHOUT ROWID;
"""


class JournalError(RuntimeError):
    """The journal cannot be used; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A request is under way. `deadline` is the one in `spec`, whose own clock ends with the boot."""

    spec: RequestSpec
    stop: tuple[str, ...]
    keep_s: float
    """How long it goes on without a client."""
    deadline: LastingDeadline | None = None


@dataclass(frozen=True, kw_only=True)
class Placed:
    """These nodes carry its stages from now on."""

    request_id: RequestId
    nodes: frozenset[NodeId]


@dataclass(frozen=True, kw_only=True)
class Emitted:
    request_id: RequestId
    token: SampledToken


@dataclass(frozen=True, kw_only=True)
class Ended:
    request_id: RequestId
    reason: FinishReason
    message: str
    stats: RequestStats
    unix_s: float


@dataclass(frozen=True, kw_only=True)
class EpochsReserved:
    """Attempts may have epochs up to this one; those of a later process lie above, whatever its clock says."""

    highest: int


Entry: TypeAlias = Accepted | Placed | Emitted | Ended | EpochsReserved


@dataclass(frozen=True, kw_only=True)
class Written:
    """One request as the journal has it."""

    accepted: Accepted
    nodes: frozenset[NodeId]
    tokens: tuple[SampledToken, ...]
    ended: Ended | None


class JournalFile:
    """Reads and writes; for one thread at a time. Raises JournalError if another process has it, or it is not one.

    What was written for another bundle is forgotten: its tokens mean nothing here.
    """

    def __init__(self, path: Path, bundle_sha256: str) -> None:
        self._path = path
        self._bundle_sha256 = bundle_sha256
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
            self._open()
        except (sqlite3.Error, OSError) as error:
            raise JournalError(
                f"cannot use the journal {path}: {error}; is another edgellm-serve using it? "
                "Give another with --journal PATH, or --journal off"
            ) from error

    def _open(self) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA wal_autocheckpoint = 0")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise JournalError(
                f"the journal {self._path} has schema {version}, this version writes {SCHEMA_VERSION}: move it away"
            )
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        if self._db.execute("SELECT sha256 FROM bundle").fetchall() != [(self._bundle_sha256,)]:
            self._db.executescript("BEGIN; DELETE FROM bundle; DELETE FROM requests; DELETE FROM tokens; COMMIT;")
            self._db.execute("INSERT INTO bundle VALUES (?, 0)", (self._bundle_sha256,))

    def write(self, entries: Iterable[Entry]) -> None:
        """All of them or none. Raises sqlite3.Error."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for entry in entries:
                self._write_one(entry)
            self._db.execute("COMMIT")
        except Exception:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _write_one(self, entry: Entry) -> None:
        match entry:
            case Accepted():
                request_id = entry.spec.request_id
                self._db.execute("DELETE FROM tokens WHERE id = ?", (request_id,))
                self._db.execute(
                    "INSERT OR REPLACE INTO requests (id, accepted) VALUES (?, ?)",
                    (request_id, msgspec.json.encode(entry)),
                )
            case Placed():
                nodes = msgspec.json.encode(entry.nodes)
                self._db.execute("UPDATE requests SET nodes = ? WHERE id = ?", (nodes, entry.request_id))
            case Emitted(token=token):
                row = (entry.request_id, token.index, msgspec.json.encode(token))
                self._db.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)", row)
            case Ended():
                self._db.execute(
                    "UPDATE requests SET ended = ?, ended_unix_s = ? WHERE id = ?",
                    (msgspec.json.encode(entry), entry.unix_s, entry.request_id),
                )
            case EpochsReserved(highest=highest):
                self._db.execute("UPDATE bundle SET epoch = max(epoch, ?)", (highest,))
            case _:
                assert_never(entry)

    def read(self) -> list[Written]:
        """All requests, oldest first."""
        rows = self._db.execute("SELECT id, accepted, nodes, ended FROM requests ORDER BY rowid").fetchall()
        return [
            Written(
                accepted=_read_accepted(accepted),
                nodes=msgspec.json.decode(nodes, type=frozenset[NodeId]) if nodes else frozenset(),
                tokens=tuple(self._tokens(request_id)),
                ended=msgspec.json.decode(ended, type=Ended) if ended else None,
            )
            for request_id, accepted, nodes, ended in rows
        ]

    def epoch(self) -> int:
        """The highest that an attempt may have had; 0 for a new journal."""
        return int(self._db.execute("SELECT epoch FROM bundle").fetchone()[0])

    def _tokens(self, request_id: str) -> Iterator[SampledToken]:
        query = "SELECT token FROM tokens WHERE id = ? ORDER BY position"
        for (token,) in self._db.execute(query, (request_id,)):
            yield msgspec.json.decode(token, type=SampledToken)

    def tidy(self, unix_s: float) -> None:
        """Forget requests that ended before, and move the log into the file. Raises sqlite3.Error."""
        ended = "SELECT id FROM requests WHERE ended_unix_s < ?"
        self._db.execute(f"DELETE FROM tokens WHERE id IN ({ended})", (unix_s,))
        self._db.execute("DELETE FROM requests WHERE ended_unix_s < ?", (unix_s,))
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self._db.close()


@dataclass(frozen=True, kw_only=True)
class _Earlier:
    """A row from before deadlines were kept on two clocks."""

    deadline_unix_s: float | None = None


def _read_accepted(row: bytes) -> Accepted:
    accepted = msgspec.json.decode(row, type=Accepted)
    unix_s = msgspec.json.decode(row, type=_Earlier).deadline_unix_s
    if unix_s is None:
        return accepted
    return replace(accepted, deadline=LastingDeadline(monotonic_s=0.0, boot_id="", unix_s=unix_s))
