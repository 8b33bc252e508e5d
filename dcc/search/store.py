"""Evaluations on disk: one SQLite file, each evaluation committed before the next, so that a killed search resumes.

A *study* is everything that must be equal for evaluations and choices to be the same: model, sampler, seeds of the
noise, options, the seed of the search. Several studies may share a file, and several processes may open it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from dcc.errors import ScheduleError, UsageError
from dcc.ir.schedule import Schedule

APPLICATION = 0x64636373  # "dccs", SQLite's application_id
FORMAT = 1
BUSY_SECONDS = 60.0

TABLES = """
CREATE TABLE studies (
    key TEXT PRIMARY KEY, identity TEXT NOT NULL, budget INTEGER NOT NULL, created REAL NOT NULL
) STRICT;
CREATE TABLE evaluations (
    study TEXT NOT NULL REFERENCES studies (key), digest TEXT NOT NULL, schedule TEXT NOT NULL, result TEXT,
    latency_ms REAL NOT NULL, loss REAL NOT NULL, psnr REAL NOT NULL, seconds REAL NOT NULL, extra TEXT NOT NULL,
    created REAL NOT NULL, PRIMARY KEY (study, digest)
) STRICT;
"""


@dataclass(frozen=True)
class Evaluation:
    """What was found out about a schedule.

    `latency_ms` comes from a calibrated cost model, so that it is the same each time. `loss` is the mean squared
    error of the samples against the exact ones, `psnr` the same in dB (infinite for no error), `seconds` what the
    evaluation took. `schedule` is the schedule that was really run where the evaluator improved on what it was
    given (weights fitted on the trajectories), else None. A figure that is not a number counts as the worst.
    """

    latency_ms: float
    loss: float
    psnr: float
    seconds: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        for name, worst in (("latency_ms", math.inf), ("loss", math.inf), ("psnr", -math.inf), ("seconds", 0.0)):
            value = float(getattr(self, name))
            object.__setattr__(self, name, worst if math.isnan(value) else value)


@dataclass(frozen=True)
class Stored:
    """One row of the store: the schedule as it was asked for, its digest, what was found, when (Unix time)."""

    digest: str
    schedule: Schedule
    evaluation: Evaluation
    created: float


class Store:
    """The evaluations of one study in a file, which is made if it is not there. A context manager.

    `identity` is plain JSON data. With `resume` the study must be in the file; without it, it must not hold any
    evaluation yet. Raises UsageError for that, for a file that is damaged or something else, and for one that cannot
    be written.
    """

    def __init__(self, path: Path | str, identity: Mapping[str, Any], budget: int = 0, resume: bool = False) -> None:
        self.path = Path(path)
        self.identity = json.loads(_text(dict(identity)))
        self.key = hashlib.sha256(_text(self.identity).encode()).hexdigest()
        if resume and not self.path.is_file():
            raise UsageError("there is no search to resume", at=self.path, next="leave out --resume to begin one")
        with self._clear_errors():
            self._connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            with self._clear_errors():
                self._prepare()
                self.first_budget = self._enter(budget, resume)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def get(self, digest: str) -> Evaluation | None:
        """What is stored of the schedule with this digest, or None."""
        with self._clear_errors():
            query = "SELECT * FROM evaluations WHERE study = ? AND digest = ?"
            row = self._connection.execute(query, (self.key, digest)).fetchone()
            return None if row is None else _stored(row).evaluation

    def put(self, schedule: Schedule, evaluation: Evaluation) -> Evaluation:
        """The evaluation is on the disk when this returns.

        The first evaluation of a schedule stays: the one that is returned is the one that counts, also where
        another search on the same study was faster.
        """
        digest = schedule.digest()
        result = None if evaluation.schedule is None else _text(evaluation.schedule.to_json())
        values = (
            self.key, digest, _text(schedule.to_json()), result, evaluation.latency_ms, evaluation.loss,
            evaluation.psnr, evaluation.seconds, _text(dict(evaluation.extra)), time.time(),
        )  # fmt: skip
        with self._clear_errors():
            self._connection.execute(f"INSERT OR IGNORE INTO evaluations VALUES ({','.join('?' * 10)})", values)
        kept = self.get(digest)
        assert kept is not None
        return kept

    def all(self) -> list[Stored]:
        """Every evaluation of the study, oldest first."""
        with self._clear_errors():
            query = "SELECT * FROM evaluations WHERE study = ? ORDER BY created, rowid"
            return [_stored(row) for row in self._connection.execute(query, (self.key,))]

    def _prepare(self) -> None:
        connection = self._connection
        connection.row_factory = sqlite3.Row
        if connection.execute("PRAGMA application_id").fetchone()[0] in (0, APPLICATION):
            # Only where it is ours or empty: it would change a data base that is then refused.
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application == 0 and tables == 0:
            # Not executescript: that would commit in between.
            for statement in TABLES.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
        found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if found[0] != APPLICATION:
            raise UsageError("this data base is not a search of dcc", at=self.path, next="name another file")
        if found[1] != FORMAT:
            want = f"format {FORMAT}"
            raise UsageError("this search was stored by another dcc", at=self.path, got=f"format {found[1]}", want=want)
        if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("its pages do not agree")

    def _enter(self, budget: int, resume: bool) -> int:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        row = connection.execute("SELECT budget FROM studies WHERE key = ?", (self.key,)).fetchone()
        if row is None and resume:
            raise self._mismatch()
        if row is None:
            values = (self.key, _text(self.identity), budget, time.time())
            connection.execute("INSERT INTO studies VALUES (?, ?, ?, ?)", values)
        else:
            done = "SELECT count(*) FROM evaluations WHERE study = ?"
            count = connection.execute(done, (self.key,)).fetchone()[0]
            if count and not resume:
                next = "--resume to go on with it, or another folder"
                raise UsageError("this search was begun before", at=self.path, got=f"{count} evaluations", next=next)
            if not count:
                connection.execute("UPDATE studies SET budget = ? WHERE key = ?", (budget, self.key))
        first = connection.execute("SELECT budget FROM studies WHERE key = ?", (self.key,)).fetchone()[0]
        connection.execute("COMMIT")
        return int(first)

    def _mismatch(self) -> UsageError:
        """Says what differs from the latest study in the file."""
        query = "SELECT identity FROM studies ORDER BY created DESC, rowid DESC LIMIT 1"
        row = self._connection.execute(query).fetchone()
        if row is None:
            return UsageError("there is no search to resume", at=self.path, next="leave out --resume to begin one")
        old = json.loads(row[0])
        names = [name for name in sorted({*old, *self.identity}) if old.get(name) != self.identity.get(name)]
        got, want = (
            ", ".join(f"{name} {_text(side.get(name)):.80}" for name in names[:6]) for side in (self.identity, old)
        )
        return UsageError(
            "the search to resume is another one", at=self.path, got=got, want=want,
            next="use the options it was begun with, or another folder",
        )  # fmt: skip

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise UsageError("the search's file cannot be used", at=self.path, got=error) from error
        except (sqlite3.DatabaseError, ScheduleError, ValueError, KeyError, TypeError) as error:
            next = "restore it or name another file"
            raise UsageError("the search's file is damaged", at=self.path, got=str(error)[:300], next=next) from error


def _stored(row: sqlite3.Row) -> Stored:
    result = None if row["result"] is None else Schedule.from_json(json.loads(row["result"]))
    evaluation = Evaluation(
        row["latency_ms"], row["loss"], row["psnr"], row["seconds"], json.loads(row["extra"]), result
    )
    return Stored(row["digest"], Schedule.from_json(json.loads(row["schedule"])), evaluation, row["created"])


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
