"""F1: a real process that writes answers is killed at random moments; each answer is paid for once, but for what was in flight."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cache_lives import RECORDS, WINDOW, answer
from potstill.cache.store import CacheReader

KILLS = 100


@pytest.fixture(scope="module")
def lives():
    script = Path(__file__).resolve().parents[1] / "cache_lives.py"
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def live(path: Path, kill_after: float | None) -> tuple[int, float]:
        request = {"path": str(path / "cache"), "log": str(path / "asked"), "kill_after": kill_after}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return tuple(json.loads(process.stdout.readline()))

    yield live
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


def _require_truth(path: Path) -> int:
    if not (path / "cache" / "cache.json").exists():
        return 0
    reader = CacheReader(str(path / "cache"))
    keys = list(reader.keys())
    numbers = [int.from_bytes(found, "big") for found in keys]
    assert len(numbers) == len(set(numbers)) == len(reader)
    payloads, entries = reader.payloads(keys)
    assert list(zip(entries["rows"].tolist(), payloads, strict=True)) == [answer(number) for number in numbers]
    assert reader.damage == []
    return len(numbers)


def test_killed_a_hundred_times_each_answer_is_paid_once_but_for_what_was_in_flight(lives, tmp_path):
    (tmp_path / "whole").mkdir()
    status, seconds = lives(tmp_path / "whole", None)
    assert status == 0
    draw = random.Random(0)
    kills = caches = 0
    while kills < KILLS:
        path = tmp_path / f"cache-{caches}"
        path.mkdir()
        killed, had = 0, 0
        while True:
            status, _ = lives(path, draw.uniform(0, seconds / 3 * (1 + killed / 20)))  # a machine that became busy ends too
            now = _require_truth(path)
            assert now >= had, "a committed answer is lost"
            had = now
            if status == 0:
                break
            assert status == -9
            killed += 1
        calls = len((path / "asked").read_text().split())
        assert had == RECORDS
        assert calls <= RECORDS + killed * WINDOW, f"{calls} questions for {RECORDS} answers after {killed} kills"
        left = [entry.name for entry in (path / "cache").iterdir() if entry.name.startswith(".tmp-")]
        assert left == [], "orphans were not swept"
        kills, caches = kills + killed, caches + 1
