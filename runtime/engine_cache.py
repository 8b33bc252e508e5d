"""Built engines on disk, found again by what they were built from.

An entry is one file: the sha256 of everything after it, a line of JSON about the engine, the engine. A damaged entry
is as good as none, and the next build replaces it. Nothing here can fail a build: an entry that cannot be written is
not written, and `EngineCache.problem` says why. Who builds an entry holds its lock, which the system lets go of when
the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    _CAN_LOCK = False
else:
    _CAN_LOCK = True

FORMAT = 1
_DIGEST = 64  # hexadecimal digits of a sha256
ABANDONED_SECONDS = 24 * 3600.0  # a file that is still being written is younger


class EngineCache:
    """A folder of engines, made when the first is stored. Processes may share it.

    What the folder does not take goes to `fallback`, another cache, where it is found as well.
    """

    def __init__(self, folder: str | os.PathLike[str], fallback: EngineCache | None = None) -> None:
        self.folder = Path(folder)
        self.fallback = fallback
        self.problem: str | None = None

    def has(self, key: str) -> bool:
        """There is an entry, which may turn out to be damaged."""
        return self._path(key).is_file() or (self.fallback is not None and self.fallback.has(key))

    def get(self, key: str) -> tuple[dict[str, Any], bytes] | None:
        """What was stored under `key`; None where there is nothing, or nothing whole."""
        found = self._read(key)
        return self.fallback.get(key) if found is None and self.fallback is not None else found

    def put(self, key: str, facts: Mapping[str, Any], engine: bytes | memoryview) -> bool:
        """The entry is there, whole; or False, nothing has changed and `problem` says why."""
        problem = self._write(key, facts, engine)
        if problem is not None and self.fallback is not None and self.fallback.put(key, facts, engine):
            problem = None
        if problem is not None:
            self.problem = problem
        return problem is None

    @contextlib.contextmanager
    def building(self, key: str, told: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Nobody else builds this entry meanwhile; `told` is called where somebody else does, who is waited for.

        Where the folder takes no locks, everybody builds.
        """
        path = self.folder / f".{key}.lock"
        descriptor = _locked(path, told)
        if descriptor is None and self.fallback is not None:
            path = self.fallback.folder / f".{key}.lock"
            descriptor = _locked(path, told)
        try:
            yield
        finally:
            if descriptor is not None:
                # Before the lock is let go of: whoever waits for it sees that the file is gone, and makes another.
                with contextlib.suppress(OSError):
                    path.unlink()
                os.close(descriptor)

    def _read(self, key: str) -> tuple[dict[str, Any], bytes] | None:
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        body = memoryview(content)[_DIGEST:]
        if hashlib.sha256(body).hexdigest().encode() != content[:_DIGEST]:
            return None
        try:
            end = content.index(b"\n", _DIGEST)
            facts: Any = json.loads(content[_DIGEST:end])
        except ValueError:
            return None
        return (facts, content[end + 1 :]) if isinstance(facts, dict) else None

    def _write(self, key: str, facts: Mapping[str, Any], engine: bytes | memoryview) -> str | None:
        """Why the entry could not be written, or None."""
        line = json.dumps(facts).encode() + b"\n"
        digest = hashlib.sha256(line)
        digest.update(engine)
        path = self._path(key)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_abandoned()
            with temporary.open("xb") as file:
                file.write(digest.hexdigest().encode())
                file.write(line)
                file.write(engine)
            temporary.replace(path)
        except OSError as error:
            return f"{self.folder}: {error.strerror or error}"
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return None

    def _clear_abandoned(self) -> None:
        """What processes that were killed left behind is gone."""
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.engine"


def _locked(path: Path, told: Callable[[], None]) -> int | None:
    """A descriptor that holds the lock of this file until it is closed; None where there can be no lock."""
    if not _CAN_LOCK:
        return None
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever had it may have removed the file: a lock on that one keeps nobody out.
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def default_folder() -> Path:
    """Where engines are kept: `engines` in $DCC_CACHE, else in $XDG_CACHE_HOME/dcc, else in ~/.cache/dcc."""
    base = os.environ.get("DCC_CACHE", "")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base else (Path(shared) if shared else Path.home() / ".cache") / "dcc"
    return folder / "engines"
