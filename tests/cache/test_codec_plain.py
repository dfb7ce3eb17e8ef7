"""Records that come back bit for bit: exact top-K, hidden and projected rows, draws."""

from dataclasses import replace

import pytest
import torch

from potstill.cache.codec import make_codec
from potstill.cache.records import DrawnTokens, HiddenRows, RecordFormat, TopKAndDrawn
from potstill.errors import ConfigError, StorageError
from potstill.signals import ProjectedOutcomes, TopKOutcomes
from zipf_rows import draws, top_k, zipf_logits

V = 900


def assert_same(a, b) -> None:
    assert a._tensors().keys() == b._tensors().keys()
    for name, tensor in a._tensors().items():
        assert torch.equal(tensor.nan_to_num(), b._tensors()[name].nan_to_num()), name


def both_ways(record, format: RecordFormat, lengths: list[int]):
    """The record from one payload, after comparing it with the same rows from several."""
    codec = make_codec(format)
    whole = codec.decode([codec.encode(record)], [len(record)])
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    payloads = [codec.encode(record.rows(slice(start, start + n))) for start, n in zip(starts, lengths, strict=True)]
    return whole, codec.decode(payloads, lengths)


@pytest.mark.parametrize("vocabulary", [200, V, 70_000])
@pytest.mark.parametrize("targets", [True, False])
def test_exact_top_k_is_bit_for_bit(vocabulary, targets):
    record = top_k(zipf_logits(12, vocabulary), 17, targets=targets)
    for decoded in both_ways(record, RecordFormat("top_k", vocabulary, k=17, exact=True), [5, 0, 7]):
        assert_same(record, decoded)


def test_exact_record_of_the_whole_vocabulary_is_the_dense_distribution():
    logits = zipf_logits(9, V)
    dense = logits.float().log_softmax(1)
    values, ids = dense.topk(V, dim=1)
    record = TopKOutcomes(ids, values, torch.full((9,), -torch.inf))
    codec = make_codec(RecordFormat("top_k", V, k=V, exact=True))
    decoded = codec.decode([codec.encode(record)], [9])
    assert torch.equal(torch.zeros(9, V).scatter(1, decoded.ids, decoded.log_probs), dense)
    assert decoded.log_tail.isneginf().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hidden_and_projected_rows_are_bit_for_bit(dtype):
    hidden = torch.randn(11, 24).to(getattr(torch, dtype))
    for decoded in both_ways(HiddenRows(hidden), RecordFormat("hidden", V, width=24, dtype=dtype), [1, 10, 0]):
        assert decoded.hidden.dtype == hidden.dtype
        assert torch.equal(decoded.hidden, hidden)
    projected = ProjectedOutcomes(hidden, torch.randn(11), torch.rand(11))
    for decoded in both_ways(projected, RecordFormat("projected", V, width=24, dtype=dtype), [1, 10, 0]):
        assert_same(projected, decoded)


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("n", [1, 50, 127])
def test_draws_are_exact(n, sharpness):
    record = draws(zipf_logits(40, V, sharpness=sharpness), n)
    for decoded in both_ways(record, RecordFormat("sampled", V, num_samples=n), [13, 0, 1, 26]):
        assert (decoded.counts.sum(1) == n).all()
        assert_same(DrawnTokens(*record._tensors().values()), decoded)


def test_draws_of_another_proposal_keep_their_weights():
    record = draws(zipf_logits(40, V), 50)
    record = DrawnTokens(record.ids, record.counts, torch.rand(record.ids.shape) * (record.counts > 0))
    for decoded in both_ways(record, RecordFormat("sampled", V, num_samples=50, proposal_exponent=0.8), [40]):
        assert_same(record, decoded)


def test_rows_without_draws_and_sequences_without_rows():
    empty = DrawnTokens(torch.zeros(3, 0).long(), torch.zeros(3, 0).long(), torch.zeros(3, 0))
    for decoded in both_ways(empty, RecordFormat("sampled", V, num_samples=5), [3, 0]):
        assert decoded.ids.shape == (3, 0)


def rest_drawn(logits: torch.Tensor, k: int, n: int) -> TopKAndDrawn:
    """The top K, and n draws from what they leave, each weighing the mass of what they leave over n."""
    top = top_k(logits, k)
    drawn = draws(logits.scatter(1, top.ids, -torch.inf), n)
    return TopKAndDrawn(top, DrawnTokens(drawn.ids, drawn.counts, (drawn.counts > 0) * (top.log_tail.exp() / n)[:, None]))


@pytest.mark.parametrize("exponent", [1.0, 0.7])
def test_top_and_draws_come_back_together(exponent):
    record = rest_drawn(zipf_logits(30, V), 20, 10)
    format = RecordFormat("top_k_sampled", V, k=20, num_samples=10, proposal_exponent=exponent, exact=True)
    for decoded in both_ways(record, format, [29, 1]):
        assert_same(record.top, decoded.top)
        torch.testing.assert_close(decoded.drawn.weights, record.drawn.weights, rtol=1e-6, atol=0)
        assert_same(record.drawn, replace(decoded.drawn, weights=record.drawn.weights))


def test_quantised_top_and_draws_still_add_up_to_one():
    record = rest_drawn(zipf_logits(30, V), 20, 10)
    codec = make_codec(RecordFormat("top_k_sampled", V, k=20, num_samples=10))
    decoded = codec.decode([codec.encode(record)], [30])
    assert torch.equal(decoded.drawn.counts, record.drawn.counts)
    mass = decoded.top.log_probs.double().exp().sum(1) + (decoded.drawn.counts * decoded.drawn.weights).double().sum(1)
    torch.testing.assert_close(mass, torch.ones(30).double(), rtol=0, atol=1e-5)


def test_too_many_draws_are_refused():
    with pytest.raises(ConfigError, match="num_samples"):
        make_codec(RecordFormat("sampled", V, num_samples=128))


@pytest.mark.parametrize("kind", ["top_k", "sampled", "top_k_sampled", "hidden", "projected"])
def test_damaged_bytes_end_in_a_storage_error(kind):
    logits = zipf_logits(6, V)
    record = {
        "top_k": top_k(logits, 9), "sampled": draws(logits, 9), "top_k_sampled": rest_drawn(logits, 9, 9),
        "hidden": HiddenRows(torch.randn(6, 8)), "projected": ProjectedOutcomes(torch.randn(6, 8), torch.randn(6), torch.randn(6)),
    }[kind]  # fmt: skip
    codec = make_codec(RecordFormat(kind, V, k=9, num_samples=9, width=8, exact=True))
    payload = codec.encode(record)
    for cut in [0, 1, len(payload) // 2, len(payload) - 1]:
        with pytest.raises(StorageError):
            codec.decode([payload[:cut]], [6])
    for rows in [5, 7] if kind != "sampled" else [5]:  # a row without draws costs no bytes
        with pytest.raises(StorageError):
            codec.decode([payload], [rows])
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        mutated = bytearray(payload)
        at = int(torch.randint(0, len(payload), (1,), generator=generator))
        mutated[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        try:
            decoded = codec.decode([bytes(mutated)], [6])
        except StorageError:
            continue
        assert len(decoded) == 6


def test_draws_cost_what_their_distinct_ids_cost():
    record = draws(zipf_logits(256, V, sharpness=1.5), 50)
    size = len(make_codec(RecordFormat("sampled", V, num_samples=50)).encode(record)) / 256
    distinct = (record.counts > 0).sum().item() / 256
    assert size < 1.172 * distinct
