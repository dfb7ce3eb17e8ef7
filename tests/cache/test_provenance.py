"""F21: a cache made from anything else is refused, the field named with both values; a path, a mount or a name is nothing else."""

import dataclasses
import random

import pytest

from faultfs import without_syncing
from naive_cache import NaiveCache
from potstill.cache.provenance import RECORD_FIELDS, Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.errors import CacheError, StorageError

FORMAT = RecordFormat("top_k", 32000, k=64)
FIELDS = {
    "teacher weights": "0123456789abcdef0123456789abcdef", "adapter weights": None, "quantisation": {"bits": 4, "kind": "nf4"},
    "teacher dtype": "bfloat16", "vocabulary size": 32000, "tokenizer": "t0", "template": "c0",
    "truncation": {"max_tokens": 2048, "too_long": "truncate_right"}, "codec version": 1, "served model": "teacher-70b",
    "probe": {"tokens": [1, 2, 3], "log_probs": [-0.5, -1.25], "tolerance": 0.05},
    "notes": {"path": "/mnt/a/teacher", "revision": "main", "potstill": "0.1.0"},
}  # fmt: skip
CHANGES = {
    "teacher weights": "ff23456789abcdef0123456789abcdef", "adapter weights": "aa", "quantisation": {"bits": 8, "kind": "nf4"},
    "teacher dtype": "float32", "vocabulary size": 32001, "tokenizer": "t1", "template": "c1",
    "truncation": {"max_tokens": 1024, "too_long": "truncate_right"}, "codec version": 2, "served model": "teacher-7b",
    "probe": {"tokens": [1, 2, 3], "log_probs": [-0.5, -1.35], "tolerance": 0.05},
}  # fmt: skip
NAMED = {
    "quantisation": "quantisation.bits: 8 here, 4 in the cache", "truncation": "truncation.max_tokens: 1024 here, 2048 in the cache",
    "adapter weights": "adapter weights: aa here, null in the cache", "codec version": "codec version: 2 here, 1 in the cache",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def _write(path, provenance, format=FORMAT, writer="0-of-1", key=b"k" * 16):
    with CacheWriter(str(path), provenance, format, writer=writer) as cache:
        cache.add(key, 1, b"payload")


@pytest.mark.parametrize("writer", ["0-of-1", "1-of-2"])
@pytest.mark.parametrize("field", CHANGES)
def test_each_field_changed_alone_is_refused_and_named(field, writer, tmp_path):
    _write(tmp_path, Provenance(FIELDS))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CacheError) as refused:
        _write(tmp_path, Provenance({**FIELDS, field: CHANGES[field]}), writer=writer)
    assert NAMED.get(field, f"{field}: ") in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert not [name for name in CHANGES if name != field and f"{name}" in str(refused.value)], "another field is named"
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.startswith(".lock")}
    assert after == {name: data for name, data in before.items() if not name.startswith(".lock")}


@pytest.mark.parametrize("field", CHANGES)
def test_a_cache_keyed_by_its_name_alone_takes_every_change(field, tmp_path):
    """What the tests above must be able to find."""
    NaiveCache(tmp_path, Provenance(FIELDS)).commit({b"k" * 16: b"payload"})
    other = NaiveCache(tmp_path, Provenance({**FIELDS, field: CHANGES[field]}))
    assert other.read(b"k" * 16) == b"payload"


@pytest.mark.parametrize("field", [name for name in FIELDS if name != "notes"])
def test_a_field_that_one_side_lacks_is_a_difference(field, tmp_path):
    less = Provenance({name: value for name, value in FIELDS.items() if name != field})
    assert [difference.field for difference in Provenance(FIELDS).differences(less)] == [field]
    assert [difference.field for difference in less.differences(Provenance(FIELDS))] == [field]
    assert less.digest != Provenance(FIELDS).digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 50}, "record.k: 50 here, 64 in the cache"), ({"temperature": 2.0}, "record.temperature: 2.0 here, 1.0 in the cache"),
        ({"outcomes": "sampled"}, "record.outcomes: sampled here, top_k in the cache"), ({"exact": True}, "record.exact: true here, false"),
        ({"num_samples": 3}, "record.num_samples: 3 here, 0"), ({"dtype": "bfloat16"}, "record.dtype: bfloat16 here, float32"),
    ],
)  # fmt: skip
def test_another_record_is_refused_to_a_writer_and_taken_by_a_reader(change, words, tmp_path):
    _write(tmp_path, Provenance(FIELDS))
    other = dataclasses.replace(FORMAT, **change)
    with pytest.raises(CacheError, match=words):
        _write(tmp_path, Provenance(FIELDS), other)
    wanted = Provenance({**FIELDS, "record": dataclasses.asdict(other), "codec version": 7})
    found = CacheReader(str(tmp_path)).provenance
    assert {difference.field.split(".")[0] for difference in wanted.differences(found)} == {"record", "codec version"}
    assert wanted.differences(found, only=[name for name in wanted.compared if name not in RECORD_FIELDS]) == []


def test_notes_alone_are_no_difference(tmp_path):
    """A path or a mount that changed, another name or version."""
    _write(tmp_path, Provenance(FIELDS))
    moved = Provenance({**FIELDS, "notes": {"path": "/mnt/b/teacher", "potstill": "0.2.0", "host": "other"}})
    _write(tmp_path, moved, key=b"m" * 16)
    _write(tmp_path, Provenance({name: value for name, value in FIELDS.items() if name != "notes"}), writer="1-of-2", key=b"n" * 16)
    reader = CacheReader(str(tmp_path))
    assert len(reader) == 3
    assert reader.provenance.notes == FIELDS["notes"]
    assert Provenance(FIELDS).digest == moved.digest


def test_measured_numbers_may_differ_by_their_tolerance_and_nothing_else_of_them_may(tmp_path):
    here = Provenance(FIELDS)

    def probe(**change):
        return Provenance({**FIELDS, "probe": {**FIELDS["probe"], **change}})

    assert here.differences(probe(log_probs=[-0.46, -1.29])) == []
    assert here.digest == probe(log_probs=[-0.46, -1.29]).digest
    assert here.differences(probe(log_probs=[-0.46, -1.31]))
    assert here.differences(probe(tokens=[1, 2, 4]))
    assert here.differences(probe(log_probs=[-0.5]))
    assert here.differences(probe(log_probs=[-0.5, None]))
    assert here.differences(Provenance({**FIELDS, "probe": None}))
    _write(tmp_path, here)
    _write(tmp_path, probe(log_probs=[-0.46, -1.29]), key=b"m" * 16)


def test_a_statement_survives_the_disk_and_shares_nothing_with_its_maker(tmp_path):
    fields = {"sizes": (1, 2), "notes": {"text": "漢\u202e\x1b[31m"}}
    made = Provenance(fields)
    _write(tmp_path, made)
    assert CacheReader(str(tmp_path)).provenance.differences(made, only=["sizes"]) == []
    with pytest.raises(ValueError):
        Provenance({"loss": float("nan")})
    assert Provenance({"a": True}).differences(Provenance({"a": 1}))


def test_no_secret_of_the_notes_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "canary-0123456789")
    _write(tmp_path, Provenance({**FIELDS, "notes": {"url": "https://user:canary@host/x", "words": ["canary-0123456789"]}}))
    assert b"canary" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_the_identity_is_that_of_what_was_compared(tmp_path):
    _write(tmp_path / "a", Provenance(FIELDS))
    _write(tmp_path / "b", Provenance({**FIELDS, "notes": {}}))
    _write(tmp_path / "c", Provenance({**FIELDS, "tokenizer": "t1"}))
    one, two, three = (CacheReader(str(tmp_path / name)).identity for name in "abc")
    assert one == two != three


def test_a_description_that_was_altered_or_is_of_another_version_is_refused(tmp_path):
    _write(tmp_path, Provenance(FIELDS))
    path = tmp_path / "cache.json"
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        bit = draw.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises((StorageError, CacheError), match=r"cache\.json"):
            CacheReader(str(tmp_path))
        with pytest.raises((StorageError, CacheError)):
            _write(tmp_path, Provenance(FIELDS))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="does not describe a cache"):
        CacheReader(str(tmp_path))
    path.write_bytes(whole.replace(b'"potstill cache": 1', b'"potstill cache": 9'))
    with pytest.raises(CacheError, match="a cache of version 9"):
        CacheReader(str(tmp_path))
    path.write_bytes(whole)
    assert len(CacheReader(str(tmp_path))) == 1


def test_a_segment_of_another_cache_is_never_taken_for_one_of_this(tmp_path):
    _write(tmp_path / "a", Provenance(FIELDS))
    _write(tmp_path / "b", Provenance({**FIELDS, "tokenizer": "t1"}), writer="strange", key=b"m" * 16)
    for name in ("strange-00000000.arrow", "strange-00000000.index"):
        (tmp_path / "b" / name).rename(tmp_path / "a" / name)
    reader = CacheReader(str(tmp_path / "a"))
    assert list(reader.keys()) == [b"k" * 16]
    assert "made from something else" in str(reader.damage[0])
