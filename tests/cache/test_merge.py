"""`merge` and `verify`: several caches become one, whatever they share; what is damaged is listed, dropped on request, never copied."""

import os
import shutil

import fsspec
import pytest

from faultfs import Workload, explore, without_syncing
from potstill.cache.merge import merge, merged_text
from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.cache.verify import verification_text, verify
from potstill.errors import CacheError

FIELDS = {"teacher weights": "aa", "tokenizer": "bb"}
FORMAT = RecordFormat("top_k", 100, k=8)
RECORDS = {os.urandom(16): (number % 5, os.urandom(200 * (number % 5))) for number in range(120)}
KEYS = list(RECORDS)


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def _write(path, keys, *, writer="0-of-1", fields=FIELDS, format=FORMAT, extra_files=None) -> str:
    with CacheWriter(str(path), Provenance(fields), format, writer=writer, extra_files=extra_files or {}, shard_bytes=30_000) as cache:
        for number, key in enumerate(keys):
            cache.add(key, *RECORDS[key])
            if number % 7 == 0:
                cache.commit()
    return str(path)


def _require(path, keys) -> None:
    reader = CacheReader(str(path))
    assert sorted(reader.keys()) == sorted(keys)
    payloads, entries = reader.payloads(keys)
    assert list(zip(entries["rows"].tolist(), payloads, strict=True)) == [RECORDS[key] for key in keys]


def _damage(path, key) -> None:
    """Flips one bit of this answer, wherever it lies."""
    for file in path.glob("*.arrow"):
        data = bytearray(file.read_bytes())
        place = data.find(RECORDS[key][1])
        if place >= 0:
            data[place + 5] ^= 4
            file.write_bytes(data)
            return
    raise AssertionError("the answer is nowhere")


def test_caches_that_overlap_become_one_with_each_answer_once(tmp_path):
    one = _write(tmp_path / "one", KEYS[:70], writer="0-of-2")
    two = _write(tmp_path / "two", KEYS[50:], writer="1-of-2", fields={**FIELDS, "notes": {"path": "/elsewhere"}})
    merged = merge(str(tmp_path / "out"), [one, two], shard_bytes=20_000)
    assert (merged.answers, merged.added, merged.damaged, merged.exit_code) == (120, 120, (), 0)
    _require(tmp_path / "out", KEYS)
    assert max(CacheReader(str(tmp_path / "out")).segments.values()) <= 20_000
    again = merge(str(tmp_path / "out"), [one, two], shard_bytes=20_000)
    assert (again.answers, again.added) == (120, 0)
    assert "120 answers, 0 of them copied now" in merged_text(again)
    assert verify(str(tmp_path / "out")).exit_code == 0


def test_between_folders_and_object_stores(tmp_path):
    one = _write(f"memory://{tmp_path.name}/one", KEYS[:70])
    two = _write(tmp_path / "two", KEYS[70:])
    merge(f"memory://{tmp_path.name}/out", [one, two])
    _require(f"memory://{tmp_path.name}/out", KEYS)
    assert verify(f"memory://{tmp_path.name}/out").exit_code == 0
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"tokenizer": "cc"}, "tokenizer: bb in the first, cc in the second"), ({"teacher weights": "dd"}, "weights: aa in the first")],
)
def test_caches_made_from_different_things_are_refused_by_field(change, words, tmp_path):
    one, two = _write(tmp_path / "one", KEYS[:10]), _write(tmp_path / "two", KEYS[10:20], fields={**FIELDS, **change})
    with pytest.raises(CacheError, match=words):
        merge(str(tmp_path / "out"), [one, two])
    assert not (tmp_path / "out").exists()
    _write(tmp_path / "out", KEYS[20:30])
    with pytest.raises(CacheError, match=str(tmp_path / "out")):
        merge(str(tmp_path / "out"), [two])


def test_other_records_and_other_heads_are_refused(tmp_path):
    one = _write(tmp_path / "one", KEYS[:10], extra_files={"head.safetensors": b"one"})
    two = _write(tmp_path / "two", KEYS[:10], extra_files={"head.safetensors": b"two"})
    three = _write(tmp_path / "three", KEYS[:10], format=RecordFormat("top_k", 100, k=9), extra_files={"head.safetensors": b"one"})
    with pytest.raises(CacheError, match=r"head\.safetensors: 3 bytes"):
        merge(str(tmp_path / "out"), [one, two])
    with pytest.raises(CacheError, match=r"record\.k: 8 in the first, 9 in the second"):
        merge(str(tmp_path / "out"), [one, three])
    with pytest.raises(CacheError, match="into itself"):
        merge(one, [one])
    with pytest.raises(CacheError, match="name at least one"):
        merge(one, [])
    merge(str(tmp_path / "out"), [one])
    assert CacheReader(str(tmp_path / "out")).file("head.safetensors") == b"one"


@pytest.mark.parametrize("fault", ["torn", "power_loss"])
def test_a_merge_that_was_broken_off_anywhere_goes_on(fault, tmp_path):
    one, two = _write(tmp_path / "in" / "one", KEYS[1:5]), _write(tmp_path / "in" / "two", KEYS[4:7])

    def run(root, done):
        merge(str(root / "out"), [one, two], shard_bytes=6_000)
        done("merged")

    def check(root, done):
        if done:
            _require(root / "out", KEYS[1:7])
        elif (root / "out" / "cache.json").exists():
            assert set(CacheReader(str(root / "out")).keys()) <= set(KEYS[1:7])
        run(root, lambda fact: None)
        _require(root / "out", KEYS[1:7])
        assert not list((root / "out").glob(".tmp-*"))

    assert explore(Workload(lambda root: None, run, check), tmp_path / "scratch", fault) > 30


def test_a_damaged_answer_is_taken_from_the_cache_that_has_it_whole_and_else_listed(tmp_path):
    one, two = _write(tmp_path / "one", KEYS[:70]), _write(tmp_path / "two", KEYS[50:])
    both, alone = KEYS[54], KEYS[14]
    for path, key in ((tmp_path / "one", both), (tmp_path / "one", alone)):
        _damage(path, key)
    merged = merge(str(tmp_path / "out"), [one, two])
    assert merged.damaged == ((alone, one),)
    assert merged.exit_code == 1
    assert alone.hex() in merged_text(merged)
    _require(tmp_path / "out", [key for key in KEYS if key != alone])
    assert alone not in CacheReader(str(tmp_path / "out"))


def test_verify_lists_what_is_damaged_and_what_is_missing(tmp_path):
    path = _write(tmp_path / "cache", KEYS[:100])
    expected = [(key, f"rows.jsonl:{number}") for number, key in enumerate(KEYS, start=1)]
    found = verify(path, expected[:100])
    assert (found.answers, found.exit_code, found.missing, found.damage) == (100, 0, {}, ())
    assert "nothing is damaged or missing" in verification_text(found)
    bad = KEYS[33]
    _damage(tmp_path / "cache", bad)
    found = verify(path, expected)
    assert (found.answers, found.exit_code, set(found.damaged)) == (99, 1, {bad})
    assert found.missing == {key: origin for key, origin in expected if key == bad or key in KEYS[100:]}
    text = verification_text(found)
    assert f"damaged: the answer {bad.hex()} in 0-of-1-" in text
    assert f"missing: the answer {bad.hex()} to rows.jsonl:34" in text
    assert f"missing: the answer {KEYS[110].hex()} to rows.jsonl:111" in text


def test_what_is_dropped_is_asked_for_again(tmp_path):
    path = _write(tmp_path / "cache", KEYS)
    for key in (KEYS[33], KEYS[71]):
        _damage(tmp_path / "cache", key)
    index = next((tmp_path / "cache").glob("*.index"))
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    found = verify(path, drop=True)
    assert (found.exit_code, found.dropped) == (1, 2)
    assert "capture again" in verification_text(found)
    assert verify(path).exit_code == 0
    _require(path, [key for key in KEYS if key not in (KEYS[33], KEYS[71])])
    _write(path, KEYS)
    _require(path, KEYS)


def test_a_damaged_index_is_mended_as_the_advice_says(tmp_path):
    path = _write(tmp_path / "cache", KEYS)
    index = next((tmp_path / "cache").glob("*.index"))
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    advice = verification_text(verify(path))
    assert "verify --drop" in advice
    assert "nothing is lost" in verification_text(verify(path, drop=True))
    assert verify(path).exit_code == 0
    _require(path, KEYS)


@pytest.mark.parametrize("fault", ["torn", "power_loss"])
def test_dropping_that_was_broken_off_anywhere_loses_nothing_whole(fault, tmp_path):
    def prepare(root):
        _write(root / "cache", KEYS[1:9])
        _damage(root / "cache", KEYS[3])

    def check(root, done):
        reader = CacheReader(str(root / "cache"))
        whole = [*{*reader.keys()} - {KEYS[3]}]
        assert sorted(whole) == sorted(key for key in KEYS[1:9] if key != KEYS[3])
        assert reader.payloads(whole)[0] == [RECORDS[key][1] for key in whole]
        assert KEYS[3] not in reader or not done

    def run(root, done):
        verify(str(root / "cache"), drop=True)
        done("dropped")

    assert explore(Workload(prepare, run, check), tmp_path / "scratch", fault) > 10


def test_nothing_is_dropped_under_a_writer_at_work(tmp_path):
    path = _write(tmp_path / "cache", KEYS)
    _damage(tmp_path / "cache", KEYS[33])
    with CacheWriter(path, Provenance(FIELDS), FORMAT), pytest.raises(CacheError, match="is at work here"):
        verify(path, drop=True)
    assert len(CacheReader(path)) == 120
    shutil.rmtree(path)
    with pytest.raises(CacheError, match="no cache of answers"):
        verify(path)
