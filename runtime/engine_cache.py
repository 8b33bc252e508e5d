"""Built engines on disk, found again by what they were built from.

An entry is one file: the sha256 of everything after it, a line of JSON about the engine, the engine. A damaged entry
is as good as none, and the next build replaces it. Nothing here can fail a build: an entry that cannot be written is
not written, and `EngineCache.problem` says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
_DIGEST = 64  # hexadecimal digits of a sha256


class EngineCache:
    """A folder of engines, made when the first is stored. Processes may share it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.problem: str | None = None

    def has(self, key: str) -> bool:
        """There is an entry, which may turn out to be damaged."""
        return self._path(key).is_file()

    def get(self, key: str) -> tuple[dict[str, Any], bytes] | None:
        """What was stored under `key`; None where there is nothing, or nothing whole."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        body = memoryview(content)[_DIGEST:]
        if hashlib.sha256(body).hexdigest().encode() != content[:_DIGEST]:
            return None
        end = content.index(b"\n", _DIGEST)
        facts: dict[str, Any] = json.loads(content[_DIGEST:end])
        return facts, content[end + 1 :]

    def put(self, key: str, facts: Mapping[str, Any], engine: bytes | memoryview) -> bool:
        """The entry is there, whole; or False, nothing has changed and `problem` says why."""
        line = json.dumps(facts).encode() + b"\n"
        digest = hashlib.sha256(line)
        digest.update(engine)
        path = self._path(key)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(digest.hexdigest().encode())
                file.write(line)
                file.write(engine)
            temporary.replace(path)
        except OSError as error:
            self.problem = f"{self.folder}: {error.strerror or error}"
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.engine"


def default_folder() -> Path:
    """Where engines are kept: `engines` in $DCC_CACHE, else in $XDG_CACHE_HOME/dcc, else in ~/.cache/dcc."""
    base = os.environ.get("DCC_CACHE", "")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base else (Path(shared) if shared else Path.home() / ".cache") / "dcc"
    return folder / "engines"
