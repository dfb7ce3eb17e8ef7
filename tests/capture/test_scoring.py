"""A record of outcomes against the whole softmax in float64; draws against a plain inverse CDF, and against p in expectation."""

import math

import pytest
import torch

from potstill.cache.codec import make_codec
from potstill.cache.records import DrawnTokens, HiddenRows, RecordFormat, TopKAndDrawn
from potstill.capture import selecting, tiles
from potstill.capture.scoring import Asked, concatenate, needs_of, record_of
from potstill.errors import IncompatibleError
from potstill.head import Head, LowRank
from potstill.signals import FullOutcomes, MixtureOutcomes, Offers, RoutedOutcomes, SampledOutcomes, TopKOutcomes

VOCABULARY, WIDTH, ROWS = 700, 24, 23


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles of several blocks, the last ones smaller."""
    monkeypatch.setattr(tiles, "_TILE_BYTES", 9 * 4 * VOCABULARY)
    monkeypatch.setattr("potstill.capture.scoring._BLOCK_BYTES", 2 * 4 * 1024)


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def full(seed: int = 0, *, dtype=torch.float32, std: float = 0.6, **arithmetic) -> FullOutcomes:
    """A head that is wider than the vocabulary: its last rows are padding with large logits."""
    weight = torch.cat([normal(VOCABULARY, WIDTH, seed=seed, std=std), normal(20, WIDTH, seed=seed + 50, std=9.0)])
    return FullOutcomes(normal(ROWS, WIDTH, seed=seed + 1).to(dtype), Head(weight.to(dtype), **arithmetic))


def log_probs(outcomes, temperature: float = 1.0) -> torch.Tensor:
    """The whole softmax in float64. A mixture is one of the members' probabilities at temperature 1, tempered as a whole."""
    if isinstance(outcomes, MixtureOutcomes):
        mixed = sum(w * log_probs(m).exp() for m, w in zip(outcomes.members, outcomes.weights, strict=True)).log()
        return (mixed / temperature).log_softmax(-1)
    head = outcomes.head
    wide = Head(
        head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap,
        tuple(LowRank(d.down.double(), d.up.double(), d.scaling) for d in head.low_rank),
    )  # fmt: skip
    return (wide.logits(outcomes.hidden.double())[:, :VOCABULARY] / temperature).log_softmax(-1)


TARGETS = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(8))
HEADS = {
    "plain": {},
    "bias": {"bias": normal(VOCABULARY + 20, seed=4)},
    "scaled": {"scale": 0.3, "softcap": 2.5},
    "adapted": {"low_rank": (LowRank(normal(3, WIDTH, seed=5, std=0.3), normal(VOCABULARY + 20, 3, seed=6, std=0.3), 2.0),)},
}


def top_k_format(k: int = 16, temperature: float = 1.0) -> RecordFormat:
    return RecordFormat("top_k", VOCABULARY, k=k, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", [*HEADS, "mixture"])
def test_top_k_is_the_head_of_the_whole_softmax(name, temperature):
    outcomes = full(**HEADS[name]) if name != "mixture" else MixtureOutcomes((full(), full(7, bias=normal(VOCABULARY + 20))), (0.3, 0.7))
    whole = log_probs(outcomes, temperature)
    record = record_of(outcomes, Asked(TARGETS), top_k_format(temperature=temperature))
    assert isinstance(record, TopKOutcomes)
    kept, ids = whole.topk(16, -1)
    assert torch.equal(record.ids, ids)
    assert record.log_probs.dtype == torch.float32
    assert torch.allclose(record.log_probs.double(), kept, atol=3e-6)
    assert torch.allclose(record.log_tail.double(), whole.scatter(-1, ids, -torch.inf).logsumexp(-1), atol=3e-6)
    assert torch.allclose(record.target_log_probs.double(), whole.gather(-1, TARGETS[:, None])[:, 0], atol=5e-6)
    assert record.temperature == temperature


def test_a_head_in_bfloat16_is_upcast_before_the_softmax():
    outcomes = full(dtype=torch.bfloat16)
    logits = (outcomes.hidden @ outcomes.head.weight.T)[:, :VOCABULARY].double()
    record = record_of(outcomes, Asked(TARGETS), top_k_format())
    assert torch.allclose(record.log_probs.double(), logits.log_softmax(-1).topk(16, -1).values, atol=3e-6)


def test_the_tail_of_a_confident_row_is_not_one_minus_the_sum():
    """Its mass is about 1e-17: 1 - sum would be 0 or noise."""
    weight = torch.zeros(VOCABULARY, 1)
    weight[3], weight[10:] = 40.0, -6.0
    outcomes = FullOutcomes(torch.ones(1, 1), Head(weight))
    record = record_of(outcomes, Asked(torch.tensor([3])), top_k_format(k=1))
    whole = weight.double()[:, 0].log_softmax(0)
    expected = float(whole[torch.arange(VOCABULARY) != 3].logsumexp(0))
    assert -40 < expected < -36
    assert float(record.log_tail) == pytest.approx(expected, abs=1e-5)


def test_everything_kept_leaves_no_tail():
    outcomes = full()
    record = record_of(outcomes, Asked(TARGETS), top_k_format(k=VOCABULARY + 5))
    assert torch.equal(record.log_tail, torch.full((ROWS,), -torch.inf))
    assert torch.allclose(torch.zeros(ROWS, VOCABULARY).scatter(-1, record.ids, record.log_probs).double(), log_probs(outcomes), atol=3e-6)


@pytest.mark.parametrize("k", [16, 600, VOCABULARY])
@pytest.mark.parametrize("kind", ["top_k", "top_k_sampled"])
def test_tokens_that_a_teacher_bans_are_no_outcomes(kind, k):
    """Fewer than K tokens have any probability: what is kept beside them is without mass, an id, and comes back from the codec."""
    allowed = 9
    banned = torch.zeros(VOCABULARY + 20).index_fill_(0, torch.arange(allowed, VOCABULARY), -torch.inf)
    outcomes = full(bias=banned)
    whole = log_probs(FullOutcomes(outcomes.hidden, Head(outcomes.head.weight[:VOCABULARY], banned[:VOCABULARY])))
    form = RecordFormat(kind, VOCABULARY, k=k, num_samples=4 * (kind != "top_k"))
    uniforms = torch.rand(ROWS, 4, dtype=torch.float64) if kind != "top_k" else None
    record = record_of(outcomes, Asked(TARGETS % allowed, uniforms), form)
    codec = make_codec(form)
    for found, close in [(record, 3e-6), (codec.decode([codec.encode(record)], [ROWS]), 0.4)]:
        if isinstance(found, TopKAndDrawn):
            assert not found.drawn.counts.any()
            found = found.top
        assert 0 <= int(found.ids.min()) <= int(found.ids.max()) < VOCABULARY
        assert torch.equal(found.log_tail, torch.full((ROWS,), -torch.inf))
        real = found.log_probs > -torch.inf
        assert torch.equal(real.sum(1), torch.full((ROWS,), allowed))
        assert torch.allclose(found.log_probs[real].double(), whole.gather(-1, found.ids)[real], atol=close)
        assert torch.allclose(found.target_log_probs.double(), whole.gather(-1, TARGETS[:, None] % allowed)[:, 0], atol=close)


@pytest.mark.parametrize(("vocabulary", "k"), [(64, 64), (101, 5), (1024, 3), (5000, 64), (4096, 1), (700, 700), (9000, 700)])
def test_the_search_finds_what_topk_finds(vocabulary, k):
    width = -(-vocabulary // (multiple := selecting.width_multiple(vocabulary, k))) * multiple
    block = torch.full((7, width), -torch.inf)
    block[:, :vocabulary] = normal(7, vocabulary)
    block[3, :vocabulary] = normal(vocabulary).round()  # ties: any of the tied will do
    values, columns = selecting.top_k(block, k)
    assert torch.equal(values, block.topk(k, -1).values)
    assert torch.equal(block.gather(1, columns), values)
    assert all(len(set(row.tolist())) == k for row in columns)


# ---------------------------------------------------------------- draws


def uniform(num_samples: int, rows: int = ROWS) -> torch.Tensor:
    return torch.rand(rows, num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def sampled_format(num_samples: int, tau: float = 1.0, **changes) -> RecordFormat:
    given = {"outcomes": "sampled", "vocabulary_size": VOCABULARY, "num_samples": num_samples, "proposal_exponent": tau, **changes}
    return RecordFormat(**given)


def by_id(drawn: DrawnTokens, values: torch.Tensor) -> torch.Tensor:
    """Values of the draws, over the vocabulary."""
    return torch.zeros(len(drawn), VOCABULARY, dtype=torch.float64).scatter_add(-1, drawn.ids, values.double())


@pytest.mark.parametrize("tau", [1.0, 0.7, 1.3])
def test_draws_invert_the_cdf(tau):
    outcomes = full()
    proposal = (tau * log_probs(outcomes)).softmax(-1)
    asked = uniform(50)
    drawn = record_of(outcomes, Asked(TARGETS, asked), sampled_format(50, tau))
    assert isinstance(drawn, DrawnTokens)
    expected = torch.searchsorted(proposal.cumsum(-1), asked, right=True)
    counts = torch.zeros(ROWS, VOCABULARY, dtype=torch.float64).scatter_add(-1, expected, torch.ones_like(asked))
    assert torch.equal(by_id(drawn, drawn.counts), counts)
    for ids, times in zip(drawn.ids, drawn.counts, strict=True):
        present = ids[times > 0].tolist()
        assert present == sorted(set(present)), "distinct and ascending"
        assert bool((times[len(present) :] == 0).all())
    weights = (log_probs(outcomes).exp() / proposal / 50).gather(-1, drawn.ids)
    assert torch.allclose(drawn.weights.double(), torch.where(drawn.counts > 0, weights, 0.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tau", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("k", [0, 5])
def test_the_mean_over_all_draws_is_the_softmax(k, tau):
    """With one draw a record, over a grid that is finer than any probability in question; the kept ids are exact."""
    outcomes, grid = full().rows(slice(0, 1)), 6_000
    whole = log_probs(outcomes)[0].exp()
    rows = FullOutcomes(outcomes.hidden.repeat(grid, 1), outcomes.head)
    steps = (torch.arange(grid, dtype=torch.float64)[:, None] + 0.5) / grid
    format = sampled_format(1, tau, outcomes="top_k_sampled" if k else "sampled", k=k)
    with pytest.MonkeyPatch.context() as patch:  # thousands of rows at once
        patch.setattr(tiles, "_TILE_BYTES", 2**24)
        patch.setattr("potstill.capture.scoring._BLOCK_BYTES", 2**22)
        record = record_of(rows, Asked(torch.zeros(grid, dtype=torch.long), steps), format)
    drawn = record.drawn if isinstance(record, TopKAndDrawn) else record
    assert isinstance(drawn, DrawnTokens)
    mean = by_id(drawn, drawn.weights * drawn.counts).mean(0)
    if isinstance(record, TopKAndDrawn):
        assert mean[record.top.ids[0]].sum() == 0, "what is kept is not drawn"
        mean[record.top.ids[0]] = record.top.log_probs[0].double().exp()
    largest_weight = float(drawn.weights.max())
    assert float((mean - whole).abs().max()) < 2 * largest_weight / grid
    assert float(mean.sum()) == pytest.approx(1.0, abs=5e-3)


def test_a_kept_vocabulary_leaves_nothing_to_draw():
    record = record_of(full(), Asked(TARGETS, uniform(9)), sampled_format(9, outcomes="top_k_sampled", k=VOCABULARY))
    assert int(record.drawn.counts.sum()) == 0
    assert bool(torch.isfinite(record.drawn.weights).all())


def test_numbers_that_decide_draws_belong_to_the_sequence_for_ever():
    alone = selecting.uniforms(3, b"k" * 16, 5, 4)
    assert alone.shape == (5, 4)
    assert (selecting.uniforms(3, b"k" * 16, 5, 4) == alone).all()
    assert not (selecting.uniforms(4, b"k" * 16, 5, 4) == alone).any()
    assert not (selecting.uniforms(3, b"j" * 16, 5, 4) == alone).any()
    assert 0 <= alone.min() < alone.max() < 1
    assert alone[0, 0] == pytest.approx(GOLDEN, abs=1e-15), "a cache that is gone on with would be of two kinds"


GOLDEN = 0.15037063774373483


def test_draws_at_the_edges_have_mass():
    mass = torch.zeros(1, 128)
    mass[0, [5, 70]] = 1.0
    edges = torch.tensor([[0.0, 0.5, math.nextafter(0.5, 0), math.nextafter(1.0, 0)]], dtype=torch.float64)
    assert selecting.draw(mass, edges).tolist() == [[5, 70, 5, 70]]


# ---------------------------------------------------------------- what is there already, and what cannot be


def served(width: int = 20, temperature: float = 1.0) -> TopKOutcomes:
    whole = log_probs(full()).float()
    kept, ids = whole.topk(width, -1)
    return TopKOutcomes(ids, kept, whole.scatter(-1, ids, -torch.inf).logsumexp(-1), None, temperature)


def test_a_servers_answer_passes_as_it_is():
    answer = served(16)
    assert record_of(answer, Asked(TARGETS), top_k_format()) is answer


def test_what_it_gave_beyond_k_goes_into_the_tail():
    record, expected = record_of(served(40), Asked(TARGETS), top_k_format()), served(16)
    assert torch.equal(record.ids, expected.ids)
    assert torch.allclose(record.log_tail, expected.log_tail, atol=1e-6)


@pytest.mark.parametrize("answer", [served(15), served(16, temperature=2.0)])
def test_too_few_or_another_temperature_is_refused(answer):
    with pytest.raises(IncompatibleError, match=r"capture\.k"):
        record_of(answer, Asked(TARGETS), top_k_format())


@pytest.mark.parametrize("outcomes", ["sampled", "hidden", "top_k_sampled"])
def test_a_servers_answer_is_no_other_record(outcomes):
    with pytest.raises(IncompatibleError, match=f"{outcomes} cannot be recorded of TopKOutcomes"):
        record_of(served(), Asked(TARGETS), RecordFormat(outcomes, VOCABULARY, k=16, num_samples=5))
    with pytest.raises(IncompatibleError):
        record_of(SampledOutcomes(TARGETS[:, None], torch.ones(ROWS, 1)), Asked(TARGETS), top_k_format())


def test_hidden_rows_are_kept_as_they_are():
    outcomes = full(dtype=torch.bfloat16)
    format = RecordFormat("hidden", VOCABULARY, width=WIDTH, dtype="bfloat16")
    record = record_of(outcomes, Asked(TARGETS), format)
    assert isinstance(record, HiddenRows)
    assert torch.equal(record.hidden, outcomes.hidden)
    with pytest.raises(IncompatibleError, match="24 wide in float32"):
        record_of(full(), Asked(TARGETS), format)


def test_rows_of_several_teachers_come_back_in_their_order():
    one, other = full(), full(31)
    even, odd = torch.arange(0, ROWS, 2), torch.arange(1, ROWS, 2)
    routed = RoutedOutcomes(((odd, other.rows(odd)), (even, one.rows(even))))
    asked = Asked(TARGETS, uniform(6))
    for format in (top_k_format(), sampled_format(6), sampled_format(6, outcomes="top_k_sampled", k=3)):
        found = record_of(routed, asked, format)
        for rows, teacher in ((even, one), (odd, other)):
            alone = record_of(teacher, asked, format).rows(rows)
            for left, right in zip(_tensors(found.rows(rows)), _tensors(alone), strict=True):
                width = min(left.shape[-1], right.shape[-1]) if left.ndim == 2 else None
                assert torch.allclose(left[..., :width].double(), right[..., :width].double(), atol=1e-5)


def _tensors(record):
    parts = [record.top, record.drawn] if isinstance(record, TopKAndDrawn) else [record]
    return [tensor for part in parts for tensor in part._tensors().values()]


@pytest.mark.parametrize("format", [top_k_format(), sampled_format(4), sampled_format(4, outcomes="top_k_sampled", k=3)])
def test_no_rows_make_a_record_of_no_rows(format):
    nothing = record_of(full().rows(slice(0, 0)), Asked(TARGETS[:0], uniform(4, 0)), format)
    assert len(nothing) == 0
    some = record_of(full(), Asked(TARGETS, uniform(4)), format)
    assert len(concatenate([nothing, some, nothing])) == ROWS


def test_a_teacher_is_asked_for_what_it_has():
    assert needs_of(top_k_format(), Offers(frozenset({"full"}))).outcomes == "full"
    needs = needs_of(top_k_format(temperature=2.0), Offers(frozenset({"top_k"}), top_k=20))
    assert (needs.outcomes, needs.top_k, needs.temperature) == ("top_k", 16, 2.0)
    assert needs_of(sampled_format(5), Offers(frozenset({"top_k"}))).outcomes == "full"
