"""Quantised top-K records: what comes back, how much KL it costs, how many bytes, and that damaged bytes end in a StorageError."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.cache.codec import VERSION, make_codec
from potstill.cache.quantiser import Quantiser
from potstill.cache.records import RecordFormat
from potstill.cache.topk_codec import TopKCodec
from potstill.errors import StorageError
from potstill.signals import TopKOutcomes
from zipf_rows import kl_by_row, top_k, zipf_logits

V, K = 4000, 64


def format_of(vocabulary: int, k: int) -> RecordFormat:
    return RecordFormat("top_k", vocabulary, k=k, temperature=1.5)


def round_trip(record: TopKOutcomes, vocabulary: int) -> TopKOutcomes:
    codec = make_codec(format_of(vocabulary, record.ids.shape[1]))
    return codec.decode([codec.encode(record)], [len(record)])


def assert_sane(record: TopKOutcomes, decoded: TopKOutcomes, mean: float = 1e-4, worst: float = 1e-2) -> None:
    kl = kl_by_row(record, decoded)
    if len(record):
        assert kl.mean() < mean
        assert kl.max() < worst
    mass = decoded.log_probs.double().exp().sum(1) + decoded.log_tail.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)
    assert (decoded.log_probs[:, 2:] <= decoded.log_probs[:, 1:-1]).all()
    assert (decoded.log_probs[:, 1:2] <= decoded.log_probs[:, :1] + 0.1).all()  # the first is what the others leave of 1
    assert decoded.temperature == 1.5


def test_what_a_code_stands_for_is_that_of_its_version():
    # A payload does not say its step: whoever changes it raises VERSION, or caches that exist are misread without a word.
    table = Quantiser(65).log_probs
    assert (VERSION, len(table)) == (1, 394)
    np.testing.assert_allclose(table[[0, 197, 393]], [-2.8480703e-03, -1.6498001, -39.762871], rtol=1e-5)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("k", [1, 20, 50, 64, 128, 300])
def test_record_costs_less_than_its_share_of_kl(k, sharpness):
    record = top_k(zipf_logits(200, V, sharpness=sharpness), k)
    decoded = round_trip(record, V)
    assert_sane(record, decoded)
    error = (decoded.target_log_probs - record.target_log_probs).abs()
    assert error.max() < 0.5
    assert error.median() < 0.15


def test_no_log_probability_moves_far():
    """Reverse KL weighs log p where p is small: the wide steps bound its error."""
    record = top_k(zipf_logits(100, V, sharpness=5.0), 64)
    assert record.log_probs.min() < -20
    decoded = round_trip(record, V)
    error = decoded.log_probs.gather(1, decoded.ids.argsort(1)) - record.log_probs.gather(1, record.ids.argsort(1))
    assert error.abs().max() < 0.45
    assert (decoded.log_tail - record.log_tail).abs().max() < 0.45


@st.composite
def records(draw):
    vocabulary = draw(st.sampled_from([2, 3, 17, 300, 70_000]))
    k = draw(st.integers(1, min(vocabulary, 40)))
    n = draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    match draw(st.sampled_from(["rows", "one-hot", "nearly one-hot", "uniform", "ties", "impossible ids"])):
        case "one-hot":
            logits = torch.full_like(logits, -torch.inf)
            logits[:, draw(st.integers(0, vocabulary - 1))] = 0
        case "nearly one-hot":
            logits[:, draw(st.integers(0, vocabulary - 1))] += draw(st.floats(5, 200))
        case "uniform":
            logits = torch.zeros_like(logits)
        case "ties":
            logits = logits.round()
        case "impossible ids":
            logits[:, vocabulary // 2 + 1 :] = -torch.inf
    if logits.isfinite().all():
        logits = logits * draw(st.sampled_from([0.1, 1.0, 3.0]))
    return top_k(logits, k, targets=draw(st.booleans())), vocabulary


@settings(max_examples=120, deadline=None)
@given(records())
def test_any_row_round_trips(case):
    record, vocabulary = case
    decoded = round_trip(record, vocabulary)
    assert_sane(record, decoded, mean=1e-2)  # of rows of any shape only the bound of a single row is promised
    assert not len(record) or (decoded.target_log_probs is None) == (record.target_log_probs is None)
    assert torch.equal(decoded.log_probs.isneginf().sum(1), record.log_probs.isneginf().sum(1))


def test_whole_vocabulary_kept():
    record = top_k(zipf_logits(30, 500), 500)
    assert record.log_tail.isneginf().all()
    decoded = round_trip(record, 500)
    assert decoded.log_tail.isneginf().all()
    assert_sane(record, decoded)


def test_many_payloads_decode_as_one_after_the_other():
    lengths = [3, 0, 1, 700, 60, 0, 200, 1]
    record = top_k(zipf_logits(sum(lengths), 1000), 20)
    codec = make_codec(format_of(1000, 20))
    starts = np.cumsum([0, *lengths])
    parts = [record.rows(slice(start, start + n)) for start, n in zip(starts, lengths, strict=False)]
    payloads = [codec.encode(part) for part in parts]
    together = codec.decode(payloads, lengths)
    alone = [codec.decode([payload], [n]) for payload, n in zip(payloads, lengths, strict=True)]
    for name, tensor in together._tensors().items():
        assert torch.equal(tensor, torch.cat([getattr(one, name) for one in alone])), name
    assert len(codec.decode([], [])) == 0


def test_mass_that_is_not_one_is_scaled_to_one():
    """A server rounds what it sends; an outcome that is what the others leave of 1 would then take up all of the error."""
    record = top_k(zipf_logits(20, V), K, targets=False)
    shifted = TopKOutcomes(record.ids, record.log_probs + 0.02, record.log_tail + 0.02)
    assert_sane(record, round_trip(shifted, V))


def damaged_payloads(payload: bytes, count: int, seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mutated = bytearray(payload)
        match rng.integers(4):
            case 0:
                mutated[rng.integers(len(mutated))] ^= 1 << rng.integers(8)
            case 1:
                del mutated[rng.integers(len(mutated)) :]
            case 2:
                at = rng.integers(len(mutated))
                mutated[at : at + 8] = rng.bytes(8)
            case 3:
                mutated += rng.bytes(rng.integers(1, 20))
        yield bytes(mutated)


@pytest.mark.parametrize("n", [1, 40])
def test_damaged_bytes_end_in_a_storage_error(n):
    record = top_k(zipf_logits(n, 300, sharpness=3.0), 30)
    codec = make_codec(format_of(300, 30))
    refused = 0
    for payload in damaged_payloads(codec.encode(record), 400, seed=n):
        try:
            decoded = codec.decode([payload], [n])
        except StorageError:
            refused += 1
        else:
            assert decoded.ids.shape == (n, 30)
            assert decoded.ids.min() >= 0
            assert decoded.ids.max() < 300
    assert refused > 100
    for rows in [n - 1, n + 1, 10**6]:
        with pytest.raises(StorageError):
            codec.decode([codec.encode(record)], [rows])


def test_sequences_that_know_their_targets_do_not_mix_with_those_that_do_not():
    codec = make_codec(format_of(V, K))
    payloads = [codec.encode(top_k(zipf_logits(300, V), K, targets=known)) for known in (True, False)]
    with pytest.raises(StorageError, match="targets"):
        codec.decode(payloads * 2, [300] * 4)


def test_codec_is_the_quantised_one():
    assert isinstance(make_codec(format_of(V, K)), TopKCodec)


@pytest.mark.parametrize(("k", "n", "bound"), [(50, 256, 68.2), (64, 256, 86.1), (64, 60, 91.4), (128, 256, 165.1), (64, 1, 144)])
def test_bytes_a_token_stay_what_they_are(k, n, bound):
    """Synthetic rows whose ids and values are less alike than a language model's; the bounds are the codec's own bytes and half of one."""
    record = top_k(zipf_logits(n, V, seed=3), k)
    size = len(make_codec(format_of(V, k)).encode(record)) / n
    assert bound - 3 < size < bound + 0.5
