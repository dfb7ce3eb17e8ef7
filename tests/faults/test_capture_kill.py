"""F1, F5, F16: a capture killed at any moment and started again by the same call ends with the same records, and pays for none twice.

Every question to the teacher is written down in a file that outlives the process; models, caches, processes and signals are real.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.cache.store import CacheReader
from potstill.capture import recording
from small_captures import held, keys_of, require_same

SERVER = Path(__file__).resolve().parents[1] / "capture_lives.py"


class Lives:
    """The server of tests/capture_lives.py and a folder for each cache."""

    def __init__(self, folder: Path):
        self.folder = folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, str(SERVER)], **pipes, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        assert self._process.stdout.readline().strip() == "ready"

    def live(self, name: str, **request) -> list[int]:
        """One start of a capture; the exit statuses of its processes. What it was asked for again is refused here, once for all."""
        cache, counter, log = (self.folder / f"{name}{end}" for end in ("", ".asked", ".log"))
        before, committed = len(self.asked(name)), set(held(cache)) if (cache / "cache.json").exists() else set()
        (self.folder / f"{name}.log.group").unlink(missing_ok=True)
        self._process.stdin.write(json.dumps({"path": str(cache), "counter": str(counter), "log": str(log), **request}) + "\n")
        self._process.stdin.flush()
        statuses = json.loads(self._process.stdout.readline())
        again = committed & set(self.asked(name)[before:])
        assert not again, "a committed record was asked for again"
        return statuses

    def asked(self, name: str) -> list[str]:
        counter = self.folder / f"{name}.asked"
        return counter.read_text().split() if counter.exists() else []

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def finish(self, name: str, **request) -> dict:
        assert self.live(name, **request) == [0] * request.get("ranks", 1), self.log(name)[-3000:]
        return json.loads(self.log(name).splitlines()[-1])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    server = Lives(tmp_path_factory.mktemp("lives"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def unbroken(lives):
    lives.finish("unbroken")
    return CacheReader(str(lives.folder / "unbroken"))


def _keys() -> list[bytes]:
    from small_captures import example_set

    return keys_of(example_set(30), example_set(12, seed=1))


KEYS = _keys()
# Sequences that a kill may cost where every unit is committed at once: one asked, those that wait, one that is coded and committed.
WINDOW = (recording._UNITS_WAITING + 2) * 16


def require_whole(lives: Lives, name: str, unbroken: CacheReader, *, kills: int) -> None:
    reader = CacheReader(str(lives.folder / name))
    assert sorted(reader.keys()) == sorted(KEYS)
    require_same(reader, unbroken, KEYS, atol=1e-5)
    assert reader.damage == []
    assert len(lives.asked(name)) <= len(KEYS) + kills * WINDOW
    left = [path.name for path in (lives.folder / name).iterdir() if path.name.startswith((".tmp-", "begun-"))]
    assert left == [], "what a killed capture left was not swept"


def test_the_unbroken_capture_asks_once(lives, unbroken):
    assert sorted(lives.asked("unbroken")) == sorted(key.hex() for key in KEYS)
    assert json.loads(lives.log("unbroken").splitlines()[-1])["redone_rows"] == 0


KILLS = [*(("ask", number) for number in range(1, 9)), ("put", 2), ("put", 5), ("commit", 1), ("commit", 3), ("commit", 6)]


@pytest.mark.parametrize(("point", "number"), KILLS)
def test_killed_at_a_unit_it_goes_on(point, number, lives, unbroken):
    name = f"{point}-{number}"
    killed = lives.live(name, at=point, number=number) == [-signal.SIGKILL]
    assert killed or number > 4, "the point was not reached"
    begun = set(lives.asked(name)) - set(held(lives.folder / name)) if killed else set()
    told = lives.finish(name)
    require_whole(lives, name, unbroken, kills=1)
    if begun:
        assert told["redone_rows"] > 0
        assert "asked for again" in lives.log(name)
    redone = [key for key in set(lives.asked(name)) if lives.asked(name).count(key) == 2]
    assert set(redone) == begun, "what is asked again is what was under way, and nothing else"


@pytest.mark.parametrize("number", [1, 4, 9, 16, 25])
def test_killed_inside_the_store_it_goes_on(number, lives, unbroken):
    name = f"operation-{number}"
    assert lives.live(name, at="operation", number=number) == [-signal.SIGKILL]
    lives.finish(name)
    require_whole(lives, name, unbroken, kills=1)


def test_killed_at_random_again_and_again(lives, unbroken):
    assert_whole_after_random_kills(lives, unbroken, "random", kills=8)


@pytest.mark.slow
def test_killed_at_random_a_hundred_times(lives, unbroken):
    for seed in range(10):
        assert_whole_after_random_kills(lives, unbroken, f"random-{seed}", kills=10, seed=seed)


def assert_whole_after_random_kills(lives: Lives, unbroken: CacheReader, name: str, *, kills: int, seed: int = 0) -> None:
    numbers = random.Random(seed)
    for _ in range(kills):
        assert lives.live(name, seconds=numbers.uniform(0.005, 0.3))[0] in (-signal.SIGKILL, 0), lives.log(name)
    lives.finish(name)
    require_whole(lives, name, unbroken, kills=kills)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_costs_nothing(number, lives, unbroken):
    name = f"signal-{int(number)}"
    assert lives.live(name, at="ask", number=3, signal=number, commit_seconds=1000.0) == [128 + number]
    assert "the same command asks for the rest" in lives.log(name)
    lives.finish(name)
    require_whole(lives, name, unbroken, kills=0)


def test_two_ranks_are_one_process_are_two_shards(lives, unbroken):
    lives.finish("ranks", ranks=2)
    for index in range(2):
        lives.finish("shards", share=(index, 2))
    for name in ("ranks", "shards"):
        require_whole(lives, name, unbroken, kills=0)
        writers = {path.name.rsplit("-", 1)[0] for path in (lives.folder / name).glob("*.index")}
        assert writers == {"0-of-2", "1-of-2"}


def test_ranks_that_are_killed_go_on_as_one_process(lives, unbroken):
    """Another number of ranks has other shares: nothing is left out and nothing is paid twice."""
    assert lives.live("killed-ranks", ranks=2, at="ask", number=2) == [-signal.SIGKILL] * 2
    lives.finish("killed-ranks")
    require_whole(lives, "killed-ranks", unbroken, kills=2)


@pytest.mark.parametrize("file_bytes", [1500, 4000])
def test_a_full_disk_ends_clearly_and_the_next_start_goes_on(file_bytes, lives, unbroken):
    """F5, with the kernel's own limit: an exit code, words, nothing torn."""
    name = f"full-{file_bytes}"
    assert lives.live(name, file_bytes=file_bytes) == [1]
    said = lives.log(name)
    assert "StorageError" in said
    assert "the limit on file size is reached" in said
    assert "traceback" not in said
    if (lives.folder / name / "cache.json").exists():
        reader = CacheReader(str(lives.folder / name))
        require_same(reader, unbroken, list(reader.keys()), atol=1e-5)
    lives.finish(name)
    require_whole(lives, name, unbroken, kills=1)
