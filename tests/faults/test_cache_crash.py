"""F1, F4, F5, F6: a writer of answers dies, tears a write, loses power or finds the disk full at every operation; nothing lies or is lost.

The same exploration must find the faults of a naive cache, and of writers that are sound but for one thing.
"""

import errno
import json
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from faultfs import CRASHES, Workload, explore, fill_up, without_syncing
from naive_cache import NaiveCache
from potstill.cache import compaction, exchange
from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.segments import DATA, INDEX, encode_data, encode_index, segment_of
from potstill.cache.store import CacheReader, CacheWriter
from potstill.errors import StorageError
from potstill.place import place_at

PROVENANCE = Provenance({"teacher weights": "aa", "notes": {"path": "/t"}})
FORMAT = RecordFormat("top_k", 100, k=8)
WINDOW = 2
SHARD = 5000
_draw = random.Random(0)
RECORDS = {_draw.randbytes(16): (number % 4, _draw.randbytes(300) if number % 4 else b"") for number in range(7)}
EXTRA = {"head.safetensors": b"weights"}


def _write(path: str, done, asked: list | None = None) -> None:
    """A capture: asks for what is not there, commits every second answer."""
    waiting = []
    with CacheWriter(path, PROVENANCE, FORMAT, shard_bytes=SHARD, extra_files=EXTRA) as writer:
        for key, (rows, payload) in RECORDS.items():
            if writer.has(key):
                continue
            if asked is not None:
                asked.append(key)
            writer.add(key, rows, payload)
            waiting.append(key)
            if len(waiting) == WINDOW:
                writer.commit()
                for committed in waiting:
                    done(committed)
                waiting.clear()
    for committed in waiting:
        done(committed)


def _require_truth(path: str, done) -> list[bytes]:
    try:
        reader = CacheReader(path)
    except StorageError:
        assert not done, "the cache is gone"
        return []
    assert all("made anew" in str(damage) for damage in reader.damage), f"what no fault of the disk explains: {reader.damage}"
    keys = list(reader.keys())
    assert len(keys) == len(set(keys)) == len(reader), "an answer stands twice"
    assert set(keys) <= RECORDS.keys(), "an answer that nobody gave"
    assert set(done) <= set(keys), "a committed answer is lost"
    payloads, entries = reader.payloads(keys)
    found = list(zip(entries["rows"].tolist(), payloads, strict=True))
    assert found == [RECORDS[key] for key in keys], "an answer that nobody gave"
    assert reader.file("head.safetensors") == EXTRA["head.safetensors"]
    return keys


def _check(path: str, done) -> None:
    sizes = place_at(path).sizes()
    had: list[bytes] = []
    if "cache.json" in sizes:
        had = _require_truth(path, done)
    else:
        assert not done, "the cache is gone"
    asked: list[bytes] = []
    _write(path, lambda key: None, asked)
    assert sorted(asked) == sorted(RECORDS.keys() - set(had)), "asked again, or not at all"
    assert len(_require_truth(path, RECORDS)) == len(RECORDS)
    stored = [key for _, keys, _ in CacheReader(path).catalogue.by_segment(doubles=True) for key in keys]
    assert len(stored) == len(RECORDS), "an answer lies in two segments"
    names = {name for name in place_at(path).sizes() if not name.startswith(".lock-")}
    parts = [found for name in names if (found := segment_of(name)) is not None]
    assert {name for name, kind in parts if kind == DATA} == {name for name, kind in parts if kind == INDEX}, "half a segment lies about"
    assert names - {f"{name}{kind}" for name, kind in parts} == {"cache.json", "head.safetensors"}, "something unfinished lies about"
    assert len(parts) <= 2 * 3, "segments were not put together"


def _folder(write) -> Workload:
    def path(root: Path) -> str:
        return str(root / "cache")

    return Workload(lambda root: None, lambda root, done: write(path(root), done), lambda root, done: _check(path(root), done))


URL = "memory://crash/cache"
IN_MEMORY = Workload(
    lambda root: fsspec.filesystem("memory").store.clear(), lambda root, done: _write(URL, done), lambda root, done: _check(URL, done)
)


# ---------------------------------------------------------------- writers with one thing wrong


@contextmanager
def _patched(module, **replacements):
    former = {name: getattr(module, name) for name in replacements}
    for name, value in replacements.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in former.items():
            setattr(module, name, value)


def _index_first(catalogue, name, records) -> None:
    data, index = encode_data(records, catalogue.digest)
    catalogue.place.put(f"{name}{INDEX}", encode_index(index))
    catalogue.place.put(f"{name}{DATA}", data)
    catalogue.extend([(name, index)])


def _with_index_first(path, done):
    from potstill.cache import store

    with _patched(store, commit=_index_first):
        _write(path, done)


def _with_old_segments_deleted_first(path, done):
    def carry(catalogue, group, next_name, **_):
        keys, entries = catalogue.within(group)
        payloads = exchange.fetch(catalogue, keys, entries)
        exchange.retire(catalogue, group)
        exchange.commit(catalogue, next_name(), list(zip(map(bytes, keys), entries["rows"].tolist(), payloads, strict=True)))

    with _patched(compaction, carry=carry):
        _write(path, done)


def _naive() -> Workload:
    def run(root, done):
        keys = list(RECORDS)
        cache = NaiveCache(root / "cache", PROVENANCE)
        for first in range(0, len(keys), WINDOW):
            part = [key for key in keys[first : first + WINDOW] if not cache.has(key)]
            cache.commit({key: RECORDS[key][1] for key in part})
            for key in part:
                done(key)

    def check(root, done):
        assert (root / "cache").exists() or not done, "the cache is gone"
        try:
            cache = NaiveCache(root / "cache", PROVENANCE)
            assert all(cache.has(key) for key in done), "a committed answer is lost"
            assert all(cache.read(key) == payload for key, (_, payload) in RECORDS.items() if cache.has(key)), "an answer that nobody gave"
        except (ValueError, KeyError) as error:
            raise AssertionError(f"the cache cannot be opened: {error}") from error

    return Workload(lambda root: None, run, check)


NAIVE = {
    **{("plain open, index first, no checksum", fault): _naive() for fault in CRASHES},
    ("the index first", "crash"): _folder(_with_index_first),
    ("old segments deleted before their shard is there", "crash"): _folder(_with_old_segments_deleted_first),
}


@pytest.mark.parametrize("fault", CRASHES)
def test_every_crash_point_of_a_writer_leaves_the_truth(fault, tmp_path):
    assert explore(_folder(_write), tmp_path, fault) > 50


@pytest.mark.parametrize("fault", ["crash", "torn"])
def test_every_crash_point_on_an_object_store_leaves_the_truth(fault, tmp_path):
    assert explore(IN_MEMORY, tmp_path, fault) > 10


@pytest.mark.parametrize(("name", "fault"), NAIVE)
def test_the_exploration_finds_the_fault_of_a_naive_writer(name, fault, tmp_path):
    with pytest.raises((AssertionError, FileNotFoundError)):
        explore(NAIVE[name, fault], tmp_path, fault)


@pytest.mark.parametrize(
    ("workload", "error_number"),
    [(_folder(_write), errno.ENOSPC), (_folder(_write), errno.EIO), (IN_MEMORY, errno.ENOSPC)],
    ids=["full folder", "failing folder", "full object store"],
)
def test_a_full_or_failing_disk_keeps_what_was_committed_and_names_the_path(workload, error_number, tmp_path):
    messages = fill_up(workload, tmp_path, error_number)
    assert len(messages) > 10
    assert all(str(tmp_path / "root" / "cache") in message or URL in message for message in messages)


def test_a_failed_commit_keeps_what_was_added_for_the_next_try(tmp_path):
    from faultfs import FaultyDisk

    keys = list(RECORDS)
    with without_syncing(), CacheWriter(str(tmp_path / "cache"), PROVENANCE, FORMAT) as writer:
        for key in keys:
            writer.add(key, *RECORDS[key])
        full = FaultyDisk(tmp_path, at=1, fault=errno.ENOSPC, lasting=True)
        with full.installed(), pytest.raises(StorageError, match="bytes are needed"):
            writer.commit()
        assert not writer.has(keys[0])
        writer.commit()
        assert writer.holds(keys).all()
    assert len(CacheReader(str(tmp_path / "cache"))) == len(RECORDS)


def test_a_vanished_folder_ends_the_writer_with_its_name(tmp_path):
    """F6: what a writer's thread calls raises, so that the thread's owner learns of it."""
    writer = CacheWriter(str(tmp_path / "cache"), PROVENANCE, FORMAT)
    writer.add(b"k" * 16, 0, b"")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(StorageError, match=r"cache/0-of-1-00000000\.arrow: .*gone"):
        writer.close()


def test_a_limit_on_file_size_is_a_full_disk(tmp_path):
    """The real errno from the real kernel; nothing is simulated."""
    script = f"""
import random, resource
from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.storage import StorageError
draw = random.Random(0)
path = {str(tmp_path / "cache")!r}
try:
    with CacheWriter(path, Provenance({{}}), RecordFormat("top_k", 100, k=8)) as writer:
        writer.add(bytes(16), 3, draw.randbytes(1000))
        writer.commit()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        writer.add(b"k" * 16, 3, draw.randbytes(50_000))
        writer.commit()
except StorageError as error:
    import json
    reader = CacheReader(path)
    print(json.dumps([str(error), len(reader), [len(payload) for payload in reader.payloads(list(reader.keys()))[0]]]))
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    message, count, sizes = json.loads(finished.stdout)
    assert "the limit on file size is reached" in message
    assert str(tmp_path / "cache") in message
    assert (count, sizes) == (1, [1000])
    left = {path.name for path in Path(tmp_path / "cache").iterdir() if not path.name.startswith(".lock")}
    assert left == {"cache.json", "0-of-1-00000000.arrow", "0-of-1-00000000.index"}
