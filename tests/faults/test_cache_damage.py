"""F7, F8, F34: a cut shard loses exactly what lay beyond the cut, no altered bit is ever used, and no name leads out of the cache."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import xxhash

from faultfs import without_syncing
from naive_cache import NaiveCache
from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.segments import decode_index, encode_data, encode_index, key_list, rebuild_index
from potstill.cache.store import CacheReader, CacheWriter
from potstill.cache.verify import verify
from potstill.errors import CacheError, PotstillError, StorageError
from potstill.storage import to_json

PROVENANCE = Provenance({"teacher weights": "aa", "notes": {"path": "/t"}})
FORMAT = RecordFormat("top_k", 100, k=8)
_draw = random.Random(0)
RECORDS = {_draw.randbytes(16): (number % 9 + 1, _draw.randbytes(_draw.randrange(100, 900))) for number in range(100)}
EXTRA = {"head.safetensors": _draw.randbytes(3000)}


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def _write(path: Path, *, shard_bytes: int = 2**20) -> None:
    with CacheWriter(str(path), PROVENANCE, FORMAT, shard_bytes=shard_bytes, extra_files=EXTRA) as writer:
        for number, (key, (rows, payload)) in enumerate(RECORDS.items()):
            writer.add(key, rows, payload)
            if number % 20 == 0:
                writer.commit()


def _require_whole(path: Path, keys) -> None:
    payloads, entries = CacheReader(str(path)).payloads(list(keys))
    assert list(zip(entries["rows"].tolist(), payloads, strict=True)) == [RECORDS[key] for key in keys]


# ---------------------------------------------------------------- F7


def test_a_cut_shard_loses_exactly_the_answers_beyond_the_cut(tmp_path):
    """The truth is found without the index: each answer's bytes are looked for in the whole file."""
    _write(tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("*.arrow")
    whole = shard.read_bytes()
    ends = {key: whole.index(payload) + len(payload) for key, (_, payload) in RECORDS.items()}
    losses = set()
    for cut in range(0, len(whole), 1024):
        shard.write_bytes(whole[:cut])
        lost = {key for key, end in ends.items() if end > cut}
        losses.add(len(lost))
        reader = CacheReader(str(tmp_path / "cache"))
        assert [set(damage.keys) for damage in reader.damage] == [lost], f"cut at {cut}"
        _require_whole(tmp_path / "cache", RECORDS.keys() - lost)
        found = verify(str(tmp_path / "cache"), [(key, key.hex()) for key in RECORDS])
        assert set(found.missing) == lost
        assert found.exit_code == 1
    assert len(losses) > 30
    shard.unlink()
    assert len(CacheReader(str(tmp_path / "cache"))) == 0


def test_what_a_cut_lost_is_asked_for_again_and_the_rest_is_not(tmp_path):
    _write(tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("*.arrow")
    os.truncate(shard, shard.stat().st_size // 2)
    kept = set(CacheReader(str(tmp_path / "cache")).keys())
    assert 30 < len(kept) < 70
    with CacheWriter(str(tmp_path / "cache"), PROVENANCE, FORMAT, extra_files=EXTRA) as writer:
        asked = [key for key in RECORDS if not writer.has(key)]
        assert set(asked) == RECORDS.keys() - kept
        for key in asked:
            writer.add(key, *RECORDS[key])
    _require_whole(tmp_path / "cache", RECORDS)
    assert verify(str(tmp_path / "cache")).exit_code == 0, "the cut shard was to be written anew"


def test_a_shard_that_is_cut_while_it_is_read_is_noticed(tmp_path):
    _write(tmp_path / "cache")
    reader = CacheReader(str(tmp_path / "cache"))
    reader.payloads(list(RECORDS))
    (shard,) = (tmp_path / "cache").glob("*.arrow")
    os.truncate(shard, 5000)
    with pytest.raises(StorageError, match="does not read back as it was written"):
        reader.payloads(list(RECORDS))


def test_a_naive_cache_does_not_notice_a_cut(tmp_path):
    cache = NaiveCache(tmp_path / "cache", PROVENANCE)
    cache.commit({key: payload for key, (_, payload) in RECORDS.items()})
    os.truncate(tmp_path / "cache" / "0.bin", 5000)
    again = NaiveCache(tmp_path / "cache", PROVENANCE)
    assert all(again.has(key) for key in RECORDS)
    assert any(again.read(key) != payload for key, (_, payload) in RECORDS.items())


# ---------------------------------------------------------------- F8


def _flips(folder: Path, count: int):
    """Flips one bit after another, each put back: every file in turn, a random place in it, so that small files count as much."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".lock"))
    draw = random.Random(3)
    for number in range(count):
        path = files[number % len(files)]
        whole = path.read_bytes()
        bit = draw.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        yield path, bit
        path.write_bytes(whole)


def _is_caught(folder: Path) -> bool:
    """Reads everything that training would read, and compares what it gets with the truth."""
    try:
        reader = CacheReader(str(folder))
        keys = [key for key in RECORDS if key in reader]
        payloads, entries = reader.payloads(keys)
        head = reader.file("head.safetensors")
    except PotstillError:
        return True
    assert list(zip(entries["rows"].tolist(), payloads, strict=True)) == [RECORDS[key] for key in keys], "an altered answer was used"
    assert head == EXTRA["head.safetensors"], "an altered head was used"
    return len(keys) < len(RECORDS) or bool(reader.damage)


def test_every_flipped_bit_of_every_file_is_caught_before_use(tmp_path):
    _write(tmp_path / "cache", shard_bytes=20_000)
    assert not _is_caught(tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.arrow"))) > 2
    kinds = set()
    missed = []
    for path, bit in _flips(tmp_path / "cache", 500):
        kinds.add(path.suffix)
        if not _is_caught(tmp_path / "cache"):
            missed.append((path.name, bit))
    assert missed == []
    assert kinds == {".arrow", ".index", ".json", ".safetensors"}
    assert not _is_caught(tmp_path / "cache")


def test_verify_finds_flipped_bits_too_and_says_which_file(tmp_path):
    _write(tmp_path / "cache", shard_bytes=20_000)
    for path, bit in _flips(tmp_path / "cache", 100):
        if path.name == "cache.json":
            with pytest.raises((StorageError, CacheError), match=r"cache\.json"):
                verify(str(tmp_path / "cache"))
            continue
        found = verify(str(tmp_path / "cache"))
        assert found.exit_code == 1, f"bit {bit} of {path.name}"
        assert path.name in {*found.damaged.values(), *(damage.name for damage in found.damage)}
    assert verify(str(tmp_path / "cache")).exit_code == 0


def test_an_index_that_is_damaged_is_made_anew_from_its_data(tmp_path):
    _write(tmp_path / "cache")
    (index,) = (tmp_path / "cache").glob("*.index")
    whole = index.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], bytes(len(whole)), whole + b"x"):
        index.write_bytes(damaged)
        _require_whole(tmp_path / "cache", RECORDS)
        assert "made anew" in str(CacheReader(str(tmp_path / "cache")).damage[0])


def test_files_that_were_forged_are_refused_in_our_own_words_and_no_altered_answer_comes_of_them():
    """Damage in several places at once, and a checksum that was made to fit it: nothing but a refusal or the truth."""
    draw = random.Random(5)
    records = [(key, rows, payload) for key, (rows, payload) in list(RECORDS.items())[:20]]
    data, index = encode_data(records, "cache")
    body, truth = encode_index(index)[:-8], {key: (rows, payload) for key, rows, payload in records}
    refused = 0
    for number in range(1500):
        forged = bytearray(data if number % 2 else body)
        for _ in range(draw.choice([1, 1, 2, 5])):
            forged[draw.randrange(len(forged))] = draw.randrange(256)
        forged = bytes(forged)
        try:
            if number % 2:
                found, _ = rebuild_index(forged)
                for key, entry in zip(key_list(found.keys), found.entries, strict=True):
                    payload = forged[entry["offset"] : entry["offset"] + entry["length"]]
                    assert truth[key] == (entry["rows"], payload), "an altered answer was used"
            else:
                found = decode_index(forged + xxhash.xxh3_64_intdigest(forged).to_bytes(8, "little"))
                ends = found.entries["offset"] + found.entries["length"]
                assert not len(ends) or (found.entries["offset"].min() >= 0 and ends.max() <= found.size)
        except StorageError:
            refused += 1
    assert refused > 300


def test_a_damaged_index_beside_damaged_data_is_a_damage_and_no_crash(tmp_path):
    _write(tmp_path / "cache", shard_bytes=20_000)
    (index, *_), (shard, *_) = sorted((tmp_path / "cache").glob("*.index")), sorted((tmp_path / "cache").glob("*.arrow"))
    index.write_bytes(index.read_bytes()[:-1])
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], bytes(len(whole)), b"", whole[:-200] + bytes(200)):
        shard.write_bytes(damaged)
        reader = CacheReader(str(tmp_path / "cache"))
        assert 0 < len(reader) < len(RECORDS)
        _require_whole(tmp_path / "cache", list(reader.keys()))
        assert "its records are lost" in str(reader.damage[0])
        assert verify(str(tmp_path / "cache")).exit_code == 1


def test_a_naive_cache_does_not_notice_flipped_bits(tmp_path):
    cache = NaiveCache(tmp_path / "cache", PROVENANCE)
    cache.commit({key: payload for key, (_, payload) in RECORDS.items()})
    used = 0
    for path, _ in _flips(tmp_path / "cache", 100):
        if path.suffix == ".bin":
            again = NaiveCache(tmp_path / "cache", PROVENANCE)
            used += any(again.read(key) != payload for key, (_, payload) in RECORDS.items())
    assert used > 20


# ---------------------------------------------------------------- F34

HOSTILE = [
    "../outside", "/etc/passwd", "a/../../outside", "..", ".", "", "a//b", "a/b/c", "a\\b", "a\0b", "a b", "a\n", "~", "~/x",
    "$HOME", "%2e%2e", "./a", "a/", "/", "a/.", "a/..", "C:x", "ünicode", "a*", "a?b", "a|b", "a;b", "`id`", "$(id)", "\u202e", "a/../a",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_wherever_they_stand(name, tmp_path):
    (tmp_path / "outside").write_bytes(b"secret")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((CacheError, StorageError, ValueError)):
        CacheWriter(str(tmp_path / "cache"), PROVENANCE, FORMAT, writer=name)
    with pytest.raises((CacheError, StorageError, ValueError)):
        CacheWriter(str(tmp_path / "cache"), PROVENANCE, FORMAT, extra_files={name: b"x"})
    _write(tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    body = json.loads(path.read_text())
    body["files"] = {name: {"size": 6, "xxh3": xxhash.xxh3_64_hexdigest(b"secret")}}
    del body["xxh3"]
    path.write_text(to_json({**body, "xxh3": xxhash.xxh3_64_hexdigest(to_json(body).encode())}, indent=1) + "\n")
    with pytest.raises(StorageError, match="not a name that a manifest may hold"):
        CacheReader(str(tmp_path / "cache")).file(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "cache"])


def test_links_in_a_cache_are_not_followed(tmp_path):
    _write(tmp_path / "cache", shard_bytes=20_000)
    _write(tmp_path / "outside", shard_bytes=20_000)
    everything = len(CacheReader(str(tmp_path / "cache")))
    for name in sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".lock")):
        path = tmp_path / "cache" / name
        data = path.read_bytes()
        path.unlink()
        path.symlink_to(tmp_path / "outside" / name)  # the same bytes, so that only the link can be at fault
        if name == "cache.json":
            with pytest.raises(StorageError, match="is it a link"):
                CacheReader(str(tmp_path / "cache"))
        elif name == "head.safetensors":
            with pytest.raises(StorageError, match="is it a link"):
                CacheReader(str(tmp_path / "cache")).file(name)
        else:
            assert len(CacheReader(str(tmp_path / "cache"))) < everything
        path.unlink()
        path.write_bytes(data)
    assert len(CacheReader(str(tmp_path / "cache"))) == everything


def test_a_link_that_takes_the_place_of_an_open_shard_or_a_pipe_leads_nowhere(tmp_path):
    _write(tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("*.arrow")
    reader = CacheReader(str(tmp_path / "cache"))
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="is it a link"):
        reader.payloads(list(RECORDS))
    shard.unlink()
    os.mkfifo(shard)
    assert len(CacheReader(str(tmp_path / "cache"))) == 0


def test_a_swept_link_is_removed_and_what_it_points_to_stays(tmp_path):
    _write(tmp_path / "cache")
    (tmp_path / "outside").write_bytes(b"precious")
    for name in ("0-of-1-00000099.arrow", ".tmp-0-of-1-00000099.arrow-1-1", ".tmp-cache.json-1-1"):
        (tmp_path / "cache" / name).symlink_to(tmp_path / "outside")
    _write(tmp_path / "cache")
    assert (tmp_path / "outside").read_bytes() == b"precious"
    _require_whole(tmp_path / "cache", RECORDS)
