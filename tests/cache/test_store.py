"""The store: what is committed is found by its key, wherever it lies; names, links and other writers cannot mislead it."""

import os
import random
import threading

import fsspec
import pytest

from faultfs import without_syncing
from potstill.cache.catalogue import Catalogue
from potstill.cache.codec import VERSION
from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.errors import CacheError, StorageError
from potstill.place import Folder

PROVENANCE = Provenance({"teacher weights": "aa", "tokenizer": "bb", "notes": {"path": "/somewhere"}})
FORMAT = RecordFormat("top_k", 32000, k=64)
SHARD = 20_000


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


@pytest.fixture(params=["folder", "memory"])
def path(request, tmp_path):
    if request.param == "folder":
        yield str(tmp_path / "cache")
        return
    url = f"memory://{tmp_path.name}/cache"
    yield url
    fsspec.filesystem("memory").store.clear()


def records(count: int, seed: int = 0, size: int = 500) -> dict[bytes, tuple[int, bytes]]:
    draw = random.Random(seed)
    return {draw.randbytes(15) + b"\0": (number % 7, draw.randbytes(draw.randrange(size) if number % 7 else 0)) for number in range(count)}


def write(path, content, *, every=10, writer="0-of-1", provenance=PROVENANCE, shard_bytes=SHARD, **more):
    with CacheWriter(str(path), provenance, FORMAT, writer=writer, shard_bytes=shard_bytes, **more) as cache:
        for number, (key, (rows, payload)) in enumerate(content.items(), start=1):
            cache.add(key, rows, payload)
            if number % every == 0:
                cache.commit()


def require_equal(reader: CacheReader, content) -> None:
    keys = list(content)
    random.Random(1).shuffle(keys)
    payloads, entries = reader.payloads(keys)
    assert payloads == [content[key][1] for key in keys]
    assert entries["rows"].tolist() == [content[key][0] for key in keys]
    assert sorted(reader.keys()) == sorted(content)
    assert len(reader) == len(content)
    assert reader.damage == []


def test_what_is_committed_is_found_by_its_key_in_any_order(path):
    content = records(300)
    write(path, content)
    reader = CacheReader(path)
    require_equal(reader, content)
    assert reader.format == FORMAT
    assert reader.provenance.differences(PROVENANCE, only=PROVENANCE.fields) == []
    assert reader.rows(next(iter(content))) == 0
    assert b"\1" * 16 not in reader
    with pytest.raises(CacheError, match="1 of 2 sequences have no answer"):
        reader.payloads([next(iter(content)), b"\1" * 16])
    assert reader.payloads([])[0] == []


def test_small_segments_become_shards_of_a_bounded_size(path):
    content = records(300)
    write(path, content)
    reader = CacheReader(path)
    sizes = list(reader.segments.values())
    assert max(sizes) <= SHARD
    total = sum(len(payload) for _, payload in content.values())
    assert len(sizes) <= 2 * total / SHARD + 2
    assert sum(sizes) < 1.4 * total


def test_an_empty_cache_and_a_record_without_rows(path):
    write(path, {})
    assert len(CacheReader(path)) == 0
    assert list(CacheReader(path).in_order()) == []
    write(path, {b"k" * 16: (0, b"")})
    require_equal(CacheReader(path), {b"k" * 16: (0, b"")})


def test_a_reader_sees_what_is_committed_while_it_is_being_written(path):
    content = records(200)
    keys = list(content)
    with CacheWriter(path, PROVENANCE, FORMAT, shard_bytes=SHARD) as writer:
        reader = CacheReader(path)
        for number, key in enumerate(keys, start=1):
            writer.add(key, *content[key])
            assert not writer.has(key)
            if number % 10 == 0:
                assert len(reader) == number - 10  # of what was added since nothing is seen
                former = keys[: number - 10]
                assert reader.payloads(former)[0] == [content[key][1] for key in former]  # segments may be gone: it looks again
                writer.commit()
                assert writer.has(key)
                assert reader.refresh() == number
    require_equal(reader, content)


def test_the_next_life_adds_only_what_is_not_there(path):
    content = records(100)
    keys = list(content)
    def stopped_half_way():
        with CacheWriter(path, PROVENANCE, FORMAT) as writer:
            for key in keys[:40]:
                writer.add(key, *content[key])
            writer.commit()
            writer.add(keys[40], *content[keys[40]])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_half_way()
    with CacheWriter(path, PROVENANCE, FORMAT) as writer:
        assert writer.holds(keys).tolist() == [True] * 40 + [False] * 60
        for key in keys:
            writer.add(key, *content[key])
    require_equal(CacheReader(path), content)


def test_writers_of_other_names_work_at_once_and_the_same_name_is_refused(path, tmp_path):
    content = records(200)
    keys = list(content)
    with (
        CacheWriter(path, PROVENANCE, FORMAT, writer="0-of-2", shard_bytes=SHARD) as one,
        CacheWriter(path, PROVENANCE, FORMAT, writer="1-of-2", shard_bytes=SHARD) as two,
    ):
        if not path.startswith("memory"):  # an object store knows no locks
            with pytest.raises(CacheError, match=r"another writer 0-of-2 is at work here .*process"):
                CacheWriter(path, PROVENANCE, FORMAT, writer="0-of-2")
        for number, key in enumerate(keys):
            (one, two)[number % 2].add(key, *content[key])
            if number % 20 == 0:
                one.commit()
        one.add(keys[1], *content[keys[1]])  # both may hold the same
    require_equal(CacheReader(path), content)


def test_many_writers_may_start_at_once(tmp_path):
    content = records(80)
    keys, errors = list(content), []

    def work(number):
        try:
            write(tmp_path / "cache", {key: content[key] for key in keys[number::8]}, writer=f"{number}-of-8")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    require_equal(CacheReader(str(tmp_path / "cache")), content)


def test_extra_files_are_kept_and_compared(path):
    write(path, {}, extra_files={"head.safetensors": b"weights"})
    reader = CacheReader(path)
    assert reader.file("head.safetensors") == b"weights"
    with pytest.raises(StorageError, match="not among the files"):
        reader.file("cache.json")
    with pytest.raises(CacheError, match=r"head\.safetensors: 8 bytes, .* here, 7 bytes, .* in the cache"):
        write(path, {}, extra_files={"head.safetensors": b"weights2"})
    with pytest.raises(CacheError, match="not a name for an extra file"):
        write(path, {}, extra_files={"0-of-1-00000000.arrow": b""})


@pytest.mark.parametrize("left", [None, b"", b"weighty"])
def test_an_extra_file_that_was_lost_or_damaged_is_put_back_by_whoever_writes_next(tmp_path, left):
    path = str(tmp_path / "cache")
    write(path, {}, extra_files={"head.safetensors": b"weights"})
    (tmp_path / "cache" / "head.safetensors").unlink()
    if left is not None:
        (tmp_path / "cache" / "head.safetensors").write_bytes(left)
    with pytest.raises(StorageError, match=r"head\.safetensors"):
        CacheReader(path).file("head.safetensors")
    write(path, {}, extra_files={"head.safetensors": b"weights"})
    assert CacheReader(path).file("head.safetensors") == b"weights"


def test_answers_of_another_codec_are_refused_and_not_misread(path):
    with CacheWriter(path, Provenance({**PROVENANCE.fields, "codec version": VERSION + 1}), FORMAT):
        pass
    with pytest.raises(CacheError, match=f"its answers are of codec version {VERSION + 1}, and this Potstill reads {VERSION}"):
        CacheReader(path)


def test_no_cache_is_said_so(path):
    with pytest.raises(CacheError, match="no cache of answers"):
        CacheReader(path)


def test_a_cache_may_be_moved_and_reached_through_a_link(tmp_path):
    content = records(20)
    write(tmp_path / "a", content)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    require_equal(CacheReader(str(tmp_path / "link")), content)
    require_equal(CacheReader(f"file://{tmp_path}/b"), content)


def test_more_shards_than_a_process_may_open_files(tmp_path):
    content = records(200)
    write(tmp_path / "cache", content, every=1, shard_bytes=1)
    reader = CacheReader(str(tmp_path / "cache"))
    assert len(reader.segments) == 200
    before = len(os.listdir("/proc/self/fd"))
    require_equal(reader, content)
    assert len(os.listdir("/proc/self/fd")) <= before + 128


def test_a_list_made_while_a_shard_replaces_its_segments_is_made_again(tmp_path):
    content = records(50)
    write(tmp_path / "cache", content)

    class Flickering(Folder):
        """The first list has seen neither the shard, which came after it looked, nor the segments, which went before."""

        looks = 0

        def sizes(self):
            self.looks += 1
            found = super().sizes()
            return {name: size for name, size in found.items() if name == "cache.json"} if self.looks == 1 else found

    digest = CacheReader(str(tmp_path / "cache")).description.digest
    assert len(Catalogue(Flickering(tmp_path / "cache"), digest)) == 50


def test_readers_and_a_writer_at_once(path):
    content = records(400)
    keys, errors, written = list(content), [], threading.Event()
    write(path, {})

    def read():
        try:
            reader = CacheReader(path)
            known = 0
            while not written.is_set() or known < len(content):
                count = reader.refresh()
                assert count >= known, "an answer went away"
                known = count
                found = [key for key in keys if key in reader]
                assert reader.payloads(found)[0] == [content[key][1] for key in found]
            assert reader.damage == []
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    write(path, content, every=5)
    written.set()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
