"""`inspect` says what a cache holds: every number against an independent count, in probability space and float64."""

import dataclasses
import os

import numpy as np
import pytest
import torch

from faultfs import without_syncing
from potstill.cache.codec import make_codec
from potstill.cache.inspect import inspect, inspection_text
from potstill.cache.provenance import Provenance
from potstill.cache.records import DrawnTokens, HiddenRows, RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.errors import StorageError
from potstill.signals import TopKOutcomes

PROVENANCE = Provenance({"tokenizer": "tt", "notes": {"path": "/teacher", "name": "evil\x1b[31m"}})
VOCABULARY, K = 50, 8
EXACT = RecordFormat("top_k", VOCABULARY, k=K, exact=True)


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def _top_k(count: int, seed: int) -> tuple[TopKOutcomes, np.ndarray, np.ndarray]:
    """A record, the probabilities that it is of, and the targets."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(count, VOCABULARY, generator=generator)).log_softmax(-1)
    targets = torch.randint(VOCABULARY, (count,), generator=generator)
    top = log_probs.topk(K)
    tail = log_probs.scatter(1, top.indices, -torch.inf).logsumexp(1)
    record = TopKOutcomes(top.indices, top.values, tail, log_probs.gather(1, targets[:, None])[:, 0])
    return record, log_probs.double().exp().numpy(), targets.numpy()


def _write(path, format, parts) -> list[bytes]:
    codec, keys = make_codec(format), []
    with CacheWriter(str(path), PROVENANCE, format) as writer:
        for number, record in enumerate(parts):
            keys.append(number.to_bytes(16, "big"))
            writer.add(keys[-1], len(record), codec.encode(record))
    return keys


def test_the_numbers_are_those_of_the_probabilities(tmp_path):
    parts = [_top_k(count, seed) for seed, count in enumerate([7, 30, 1, 62])]
    _write(tmp_path, EXACT, [record for record, _, _ in parts])
    found = inspect(str(tmp_path))
    probabilities, targets = np.concatenate([p for _, p, _ in parts]), np.concatenate([t for _, _, t in parts])
    kept = np.sort(probabilities, axis=1)[:, -K:]
    rest = 1 - kept.sum(1)
    entropy = -(kept * np.log(kept)).sum(1) - rest * np.log(rest)
    ranks = (probabilities > probabilities[np.arange(100), targets][:, None]).sum(1)
    assert (found.sequences, found.rows, found.contents.rows, found.segments) == (4, 100, 100, 1)
    assert found.contents.mean_mass == pytest.approx(kept.sum(1).mean(), abs=1e-6)
    assert found.contents.worst_mass == pytest.approx(np.sort(kept.sum(1))[:10].mean(), abs=1e-6)
    assert found.contents.entropy == pytest.approx(entropy.mean(), abs=1e-6)
    assert found.contents.entropy < -(probabilities * np.log(probabilities)).sum(1).mean()
    assert found.contents.target_share == pytest.approx((ranks < K).mean(), abs=1e-9)
    files = [path for path in tmp_path.iterdir() if path.suffix in (".arrow", ".index")]
    assert found.bytes_a_token == pytest.approx(sum(path.stat().st_size for path in files) / 100)


def test_a_sample_is_near_the_whole(tmp_path):
    _write(tmp_path, EXACT, [_top_k(20, seed)[0] for seed in range(100)])
    whole, sample = inspect(str(tmp_path)), inspect(str(tmp_path), sample_rows=500)
    assert whole.contents.rows == 2000
    assert sample.contents.rows == 500
    assert sample.rows == 2000
    assert sample.contents.mean_mass == pytest.approx(whole.contents.mean_mass, abs=0.02)


def test_kinds_that_say_less_say_nothing_of_it(tmp_path):
    hidden = RecordFormat("hidden", VOCABULARY, width=4)
    _write(tmp_path / "hidden", hidden, [HiddenRows(torch.randn(5, 4))])
    assert dataclasses.astuple(inspect(str(tmp_path / "hidden")).contents) == (5, None, None, None, None, None)
    drawn = DrawnTokens(torch.tensor([[3, 7]] * 5), torch.tensor([[1, 1], [2, 0]] + [[1, 1]] * 3), torch.full((5, 2), 0.5))
    _write(tmp_path / "sampled", RecordFormat("sampled", VOCABULARY, num_samples=2), [drawn])
    contents = inspect(str(tmp_path / "sampled")).contents
    assert contents.ids_a_row == pytest.approx(1.8)
    assert contents.mean_mass is None
    with CacheWriter(str(tmp_path / "empty"), PROVENANCE, EXACT):
        pass
    assert inspect(str(tmp_path / "empty")).contents.rows == 0
    assert "0 sequences" in inspection_text(inspect(str(tmp_path / "empty")))


def test_the_text_names_everything_that_matters(tmp_path):
    _write(tmp_path, EXACT, [_top_k(20, 0)[0]])
    (tmp_path / "0-of-1-00000009.arrow").write_bytes(b"torn")
    text = inspection_text(inspect(str(tmp_path)))
    for words in (str(tmp_path), "top_k, k = 8", "1 sequence, 20 tokens", "bytes a token", "in the worst tenth", "tokenizer", "tt",
                  "note: path", "/teacher", "not committed", "0-of-1-00000009.arrow", "targets among the kept"):  # fmt: skip
        assert words in text, words


def test_what_a_record_loses_stands_among_the_lines(tmp_path):
    _write(tmp_path, EXACT, [_top_k(20, 0)[0]])
    assert "lost by coding  " in inspection_text(inspect(str(tmp_path)), [("lost by coding", "little")])


def test_decoded_answers_come_in_the_order_of_the_keys_and_a_payload_that_does_not_decode_is_named(tmp_path):
    parts = [_top_k(count, seed)[0] for seed, count in enumerate([7, 0, 30])]
    keys = _write(tmp_path, EXACT, parts)
    read = CacheReader(str(tmp_path)).read([keys[2], keys[0], keys[1], keys[2]])
    assert torch.equal(read.log_probs, torch.cat([parts[2].log_probs, parts[0].log_probs, parts[2].log_probs]))
    with CacheWriter(str(tmp_path), PROVENANCE, EXACT) as writer:
        writer.add(b"b" * 16, 3, b"not a payload")
    with pytest.raises(StorageError, match=rf"0-of-1-\d+\.arrow: the answer {(b'b' * 16).hex()}: does not decode"):
        CacheReader(str(tmp_path)).read([keys[0], b"b" * 16])


def test_a_damaged_answer_is_said_and_the_others_are_counted(tmp_path):
    _write(tmp_path, EXACT, [_top_k(20, seed)[0] for seed in range(5)])
    (shard,) = tmp_path.glob("*.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    found = inspect(str(tmp_path))
    assert (found.rows, found.contents.rows) == (100, 80)
    os.truncate(shard, len(data) // 2)
    text = inspection_text(inspect(str(tmp_path)))
    assert "damaged" in text
    assert "of its 5 records are lost" in text
