"""Engines on disk: shared by processes, kept elsewhere where the folder takes none, cleared of what a kill left."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dcc.exports.cached_build import cached_engine
from dcc.runtime.engine_cache import ABANDONED_SECONDS, EngineCache
from dcc.runtime.tensorrt_builder import BuildRequest

KEY = "0" * 64


@pytest.fixture
def in_the_way(tmp_path: Path) -> Path:
    """A folder that cannot be made."""
    path = tmp_path / "file"
    path.write_text("in the way")
    return path / "engines"


def test_what_the_folder_does_not_take_goes_to_the_fallback(tmp_path: Path, in_the_way: Path) -> None:
    cache = EngineCache(in_the_way, EngineCache(tmp_path / "other"))
    with cache.building(KEY):
        assert cache.get(KEY) is None and not cache.has(KEY)
        assert cache.put(KEY, {"engine": "step"}, b"bytes")
    assert cache.problem is None and cache.has(KEY)
    assert cache.get(KEY) == ({"engine": "step"}, b"bytes")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [f"{KEY}.engine"]
    alone = EngineCache(in_the_way, EngineCache(in_the_way))
    assert not alone.put(KEY, {}, b"bytes")
    assert alone.problem == f"{in_the_way}: Not a directory"


def test_the_folder_comes_before_the_fallback(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "one", EngineCache(tmp_path / "other"))
    assert cache.put(KEY, {}, b"one") and not (tmp_path / "other").exists()
    cache.fallback.put(KEY, {}, b"other")  # type: ignore[union-attr]
    assert cache.get(KEY) == ({}, b"one")
    (tmp_path / f"one/{KEY}.engine").write_bytes(b"damaged")
    assert cache.get(KEY) == ({}, b"other")


def test_an_entry_that_is_whole_and_not_ours_is_none(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    for body in (b"", b"no newline", b"no JSON\nbytes", b"[1]\nbytes"):
        (tmp_path / f"{KEY}.engine").write_bytes(hashlib.sha256(body).hexdigest().encode() + body)
        assert cache.get(KEY) is None


def test_an_entry_of_another_version_is_built_again(tmp_path: Path) -> None:
    cache, request = EngineCache(tmp_path), BuildRequest("step", b"", (80,))
    for facts in ({}, {"record": {}, "cost": {"hours": 2}}, {"record": {}, "cost": None}):
        cache.put(KEY, facts, b"bytes")
        assert cached_engine(request, KEY, cache) is None


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    old, new = tmp_path / ".0123.tmp", tmp_path / ".4567.tmp"
    for path in (old, new):
        path.write_bytes(b"half an engine")
    before = time.time() - ABANDONED_SECONDS - 60
    os.utime(old, (before, before))
    EngineCache(tmp_path).put(KEY, {}, b"bytes")
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, f"{KEY}.engine"]


def test_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    """Each thread with a cache of its own, as processes have."""
    inside, most, waited, built = [0], [0], [], []
    start = threading.Barrier(4, timeout=20)

    def build() -> None:
        cache = EngineCache(tmp_path)
        start.wait()
        with cache.building(KEY, lambda: waited.append(1)):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            if cache.get(KEY) is None:
                time.sleep(0.05)
                built.append(cache.put(KEY, {}, b"bytes"))
            inside[0] -= 1

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (most, built, len(waited) >= 1) == ([1], [True], True)
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.engine"], "a lock was left"


def test_another_entry_is_not_waited_for(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    with cache.building(KEY), cache.building("1" * 64, lambda: pytest.fail("it waits")):
        pass


def test_a_lock_does_not_outlive_a_killed_process(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from dcc.runtime.engine_cache import EngineCache\n"
        "with EngineCache(sys.argv[1]).building(sys.argv[2]):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), KEY], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [f".{KEY}.lock"]
    with EngineCache(tmp_path).building(KEY, lambda: pytest.fail("it waits")):
        pass
    assert list(tmp_path.iterdir()) == []
