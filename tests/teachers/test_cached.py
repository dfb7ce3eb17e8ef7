"""Cached = live: the same losses and the same gradients, whatever shares a row, a batch or a window; and what is not there is refused."""

from dataclasses import replace

import pytest
import torch

from potstill.batch import Batch
from potstill.cache.codec import make_codec
from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.data.collation import collate, empty_batch
from potstill.data.examples import ExampleSetBuilder
from potstill.errors import CacheError, IncompatibleError, StorageError
from potstill.head import Head, LowRank, head_digest
from potstill.models.causal_lm import CausalLM
from potstill.objectives.distribution import DistributionMatching
from potstill.signals import FullOutcomes, Needs, Offers, ProjectedOutcomes, SampledOutcomes, TopKOutcomes
from potstill.teachers.cached import HEAD_FIELD, CachedTeacher, head_from_bytes, head_to_bytes, most_likely, refuse_foreign
from potstill.teachers.teacher import Teacher, require, require_answers
from potstill.training.distiller import Distiller
from recorded import PROVENANCE, VOCABULARY, example_set, local_teacher, record
from tiny import tiny_llama

EXAMPLES = example_set()
FORMATS = {
    "hidden": RecordFormat("hidden", VOCABULARY, width=32),
    "whole": RecordFormat("top_k", VOCABULARY, k=VOCABULARY, exact=True),
    "top_k": RecordFormat("top_k", VOCABULARY, k=64, exact=True),
    "sampled": RecordFormat("sampled", VOCABULARY, num_samples=20),
    "both": RecordFormat("top_k_sampled", VOCABULARY, k=8, num_samples=20, exact=True),
    "projected": RecordFormat("projected", VOCABULARY, width=16),
}


def a_student(frozen_head: bool = False) -> CausalLM:
    student = CausalLM(tiny_llama(11, width=16, initializer_range=0.2), VOCABULARY)
    student.inner.lm_head.requires_grad_(not frozen_head)
    return student


@pytest.fixture(scope="module")
def live():
    return local_teacher()


@pytest.fixture(scope="module")
def cached(live, tmp_path_factory):
    """The caches by name, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("caches"), {}

    def get(name) -> CachedTeacher:
        if name not in made:
            head = a_student(frozen_head=True).head()
            more = {"project_on": head, HEAD_FIELD: head_digest(head, VOCABULARY)} if name == "projected" else {}
            made[name] = record(folder / name, live, EXAMPLES, FORMATS[name], **more)
        return CachedTeacher(made[name], vocabulary_size=VOCABULARY)

    return get


def batches(*windows, examples=EXAMPLES, widest=None) -> list[Batch]:
    """Each window is a batch, given as rows of example numbers."""
    return [collate([[examples[i] for i in row] for row in rows], pad_token=0, widest=widest) for rows in windows]


PADDED = batches([[index] for index in range(9)])
CUTS = {
    "padded": PADDED,
    "packed": batches([[4, 0, 7], [2], [8, 1, 3], [6, 5]]),
    "accumulated": batches([[8], [3]], [[0, 1]], [[2, 4], [5]], [[7, 6]]),
    "ranks": batches([[1, 3, 5, 7]], [[0, 2], [4, 6, 8]]),
}


def learn(teacher: Teacher, windows: list[Batch], frozen_head: bool = False, **objective) -> tuple[float, torch.Tensor]:
    """(loss, gradient) of one step, with the loss divided by the count of all its batches."""
    student = a_student(frozen_head)
    distiller = Distiller(student, DistributionMatching(**{"kd_ratio": 0.7, "vocabulary_size": VOCABULARY, **objective}))
    require(teacher, distiller.objective.needs)
    totals = [distiller(batch, teacher.score(batch, distiller.objective.needs))[0] for batch in windows]
    total = torch.stack(totals).sum() / sum(batch.num_targets for batch in windows)
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.requires_grad])


def close(one, other, tolerance=1e-5) -> bool:
    scale = float(other[1].abs().max())
    assert scale > 1e-3
    return abs(one[0] - other[0]) < tolerance and float((one[1] - other[1]).abs().max()) < tolerance * max(scale, 1)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("cut", CUTS)
def test_hidden_rows_are_the_live_teacher(live, cached, cut, divergence):
    expected = learn(live, PADDED, divergence=divergence)
    found = learn(cached("hidden"), CUTS[cut], divergence=divergence)
    assert close(found, expected, 1e-6)
    assert not close(learn(local_teacher(6), PADDED, divergence=divergence), expected)  # the comparison can fail


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("cut", CUTS)
def test_all_tokens_kept_are_the_live_teacher(live, cached, cut, divergence):
    expected = learn(live, PADDED, divergence=divergence)
    assert close(learn(cached("whole"), CUTS[cut], divergence=divergence, support="top_k_tail"), expected)


@pytest.mark.parametrize("cut", CUTS)
def test_a_projected_record_is_the_live_teacher_for_the_head_that_it_was_made_on(live, cached, cut):
    expected = learn(live, PADDED, frozen_head=True)
    found = learn(cached("projected"), CUTS[cut], frozen_head=True, support="projected")
    assert close(found, expected)
    with pytest.raises(IncompatibleError, match="this head learns"):
        learn(cached("projected"), CUTS[cut], support="projected")


@pytest.mark.parametrize("cut", CUTS)
def test_64_kept_tokens_differ_by_what_the_formula_says(live, cached, cut):
    """FKL = FKL on top-K and tail + (1 - a) KL(p_tail / (1 - a) || q_tail / (1 - b)), in float64 in probability space, by autograd."""
    student = tiny_llama(11, width=16, initializer_range=0.2)
    lost = torch.zeros((), dtype=torch.float64)
    for index in range(len(EXAMPLES)):
        batch = collate([[EXAMPLES[index]]], pad_token=0, multiple_of=None)
        rows = batch.target_rows()[0]
        p, q = (m(input_ids=batch.tokens).logits[0, rows].double().softmax(-1) for m in (live.causal_lm.model, student))
        tail = torch.ones_like(p).scatter(1, p.topk(64).indices, 0.0)
        a, b = ((distribution * tail).sum(1, keepdim=True) for distribution in (p, q))
        lost = lost + (a * (p / a) * ((p / a) / (q / b)).log() * tail).sum()
    lost = 0.7 * lost / sum(batch.num_targets for batch in PADDED)
    lost.backward()
    of_formula = torch.cat([p.grad.flatten() for p in student.parameters()])
    whole, kept = learn(live, PADDED), learn(cached("top_k"), CUTS[cut], support="top_k_tail")
    assert lost.item() > 1e-3
    assert whole[0] - kept[0] == pytest.approx(lost.item(), abs=1e-5)
    assert float((whole[1] - kept[1] - of_formula).abs().max()) < 1e-5 * max(1, float(of_formula.abs().max()))


def test_the_answers_are_in_the_order_of_the_target_rows(live, cached):
    for windows in CUTS.values():
        for batch in windows:
            expected = live.score(batch, Needs("full")).outcomes
            log_probs = expected.head.logits(expected.hidden).log_softmax(-1)
            top = cached("top_k").score(batch, Needs("top_k")).outcomes
            assert isinstance(top, TopKOutcomes)
            assert torch.allclose(top.log_probs, log_probs.gather(1, top.ids), atol=1e-5)
            assert torch.allclose(top.target_log_probs, log_probs.gather(1, batch.target_rows()[1][:, None])[:, 0], atol=1e-5)


def test_draws_are_the_same_in_every_batch_and_their_weights_are_probabilities_in_the_mean(cached):
    def dense(teacher, batch):
        drawn = teacher.score(batch, Needs("sampled")).outcomes
        assert isinstance(drawn, SampledOutcomes)
        return torch.zeros(batch.num_targets, VOCABULARY).scatter_add(1, drawn.ids, drawn.weights)

    for name in ("sampled", "both"):
        packed, padded = CUTS["packed"][0], PADDED[0]
        order = [4, 0, 7, 2, 8, 1, 3, 6, 5]
        by_example = dict(enumerate(torch.split(dense(cached(name), padded), [int(n) for n in EXAMPLES.target_counts])))
        assert torch.equal(dense(cached(name), packed), torch.cat([by_example[index] for index in order]))
        assert torch.allclose(dense(cached(name), padded).sum(1), torch.ones(padded.num_targets), atol=1e-5)
    exact = cached("both").score(padded, Needs("top_k")).outcomes
    assert isinstance(exact, TopKOutcomes)
    on_top = dense(cached("both"), padded).gather(1, exact.ids)
    assert torch.allclose(on_top, exact.log_probs.exp(), atol=1e-6)  # the head is exact, draws are of the rest


# ---------------------------------------------------------------- fewer than were kept


def test_of_more_tokens_than_are_asked_for_the_most_likely_stay(cached):
    whole = cached("top_k").score(PADDED[0], Needs("top_k")).outcomes
    less = cached("top_k").score(PADDED[0], Needs("top_k", top_k=5)).outcomes
    assert less.ids.shape == (PADDED[0].num_targets, 5)
    assert torch.equal(less.log_probs, whole.log_probs.sort(dim=1, descending=True).values[:, :5])
    mass = less.log_probs.double().exp().sum(1) + less.log_tail.double().exp()
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-6)
    assert torch.equal(less.target_log_probs, whole.target_log_probs)
    with pytest.raises(IncompatibleError, match="offers 64 kept outcomes, not 65"):
        require(cached("top_k"), Needs("top_k", top_k=65))


def test_of_equally_likely_tokens_the_smaller_ids_stay_wherever_they_stood():
    ids = torch.tensor([[9, 4, 7, 2], [2, 7, 4, 9]])
    top = TopKOutcomes(ids, torch.full((2, 4), 0.2).log(), torch.full((2,), 0.2).log())
    less = most_likely(top, 2)
    assert less.ids.tolist() == [[2, 4], [2, 4]]
    assert torch.allclose(less.log_tail.exp(), torch.full((2,), 0.6))
    assert most_likely(top, None) is most_likely(top, 4) is top
    with pytest.raises(IncompatibleError, match="4 outcomes are kept and 5 are asked for"):
        most_likely(top, 5)


def test_fewer_are_those_that_a_plain_sort_gives_whatever_the_order_and_the_numbers():
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(200, 12, generator=generator).mul(6).round() - 3  # many ties, numbers of both signs
    log_probs[:, 3], log_probs[::2, 5], log_probs[::3, 7] = -torch.inf, 0.0, -1e-30
    ids = torch.stack([torch.randperm(151_936, generator=generator)[:12] for _ in range(200)])
    less = most_likely(TopKOutcomes(ids, log_probs, torch.full((200,), -2.0)), 5)
    for row in range(200):
        pairs = sorted(zip((-log_probs[row]).tolist(), ids[row].tolist(), strict=True))
        found = zip(less.log_probs[row].tolist(), less.ids[row].tolist(), strict=True)
        assert [(-value, number) for value, number in pairs[:5]] == list(found)
        tail = torch.tensor([-value for value, _ in pairs[5:]] + [-2.0], dtype=torch.float64).logsumexp(0)
        assert less.log_tail[row].item() == pytest.approx(tail.item(), abs=1e-6)


# ---------------------------------------------------------------- what is offered


@pytest.mark.parametrize(
    ("name", "offers"),
    [
        ("hidden", Offers(frozenset({"full"}))),
        ("top_k", Offers(frozenset({"top_k"}), 64, 1.0)),
        ("sampled", Offers(frozenset({"sampled"}), None, 1.0)),
        ("both", Offers(frozenset({"top_k", "sampled"}), 8, 1.0)),
        ("projected", Offers(frozenset({"projected"}), None, 1.0)),
    ],
)
def test_it_offers_what_was_recorded(cached, name, offers):
    teacher: Teacher = cached(name)
    assert teacher.offers == offers
    assert teacher.identity == {"teacher cache": teacher._reader.identity}
    teacher.close()
    if name != "hidden":
        with pytest.raises(IncompatibleError, match=r"forward_kl asks for full outcomes of the teacher, but the cache .* offers"):
            require(teacher, Needs("full"), "forward_kl")


def test_a_rank_without_rows_gets_answers_without_rows(cached):
    for name, needs in {"hidden": "full", "whole": "top_k", "top_k": "top_k", "sampled": "sampled", "both": "sampled",
                        "projected": "projected"}.items():  # fmt: skip
        outcomes = cached(name).score(empty_batch(pad_token=0), Needs(needs)).outcomes
        assert len(outcomes) == 0
        kinds = {"full": FullOutcomes, "top_k": TopKOutcomes, "sampled": SampledOutcomes, "projected": ProjectedOutcomes}
        assert isinstance(outcomes, kinds[needs])
    assert cached("top_k").score(PADDED[0], Needs()).outcomes is None


# ---------------------------------------------------------------- what is not there


def changed(index: int):
    """The examples with one token of one of them changed."""
    builder = ExampleSetBuilder(torch.zeros(VOCABULARY, dtype=torch.long).numpy())
    for number, example in enumerate(EXAMPLES):
        tokens = [*example.tokens[:-1], (example.tokens[-1] + (number == index)) % VOCABULARY]
        marked = [place for place, mark in enumerate(example.is_target) if mark]
        builder.add(tokens, [(marked[0], marked[-1] + 1)], "train.jsonl", number + 1)
    return builder.build()


def test_a_changed_row_is_named_with_its_place(cached):
    teacher = cached("top_k")
    assert teacher.missing(EXAMPLES) == teacher.missing(changed(-1)) == []
    require_answers(teacher, EXAMPLES, None)
    assert teacher.missing(changed(6)) == [6]
    assert teacher.missing(changed(3)) == []  # it has no target that anything predicts
    with pytest.raises(CacheError, match=r"1 of 9 sequences have no answer in the cache, the first is train\.jsonl:7; these rows are new"):
        require_answers(teacher, EXAMPLES, changed(6))
    with pytest.raises(CacheError, match=r"1 of 2 sequences of a batch \(examples 6\) have no answer"):
        teacher.score(batches([[1, 6]], examples=changed(6))[0], Needs("top_k"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("truncation", {"max_tokens": 32, "too_long": "truncate_left"}), ("template", "another"), ("tokenizer", "another")],
)
def test_the_likely_cause_is_the_field_that_differs(cached, field, value):
    wanted = {name: PROVENANCE[name] for name in ("tokenizer", "template", "truncation")}
    same = CachedTeacher(cached("top_k")._reader, vocabulary_size=VOCABULARY, wanted=wanted)
    with pytest.raises(CacheError, match="the tokenizer, template, truncation are those of the cache, so these rows are new or changed"):
        same.refuse_missing(changed(2))
    other = CachedTeacher(cached("top_k")._reader, vocabulary_size=VOCABULARY, wanted={**wanted, field: value})
    with pytest.raises(CacheError, match=rf"train\.jsonl:3; the likely cause is another {field}"):
        other.refuse_missing(changed(2))


@pytest.mark.parametrize("field", [name for name in PROVENANCE if name != "notes"])
def test_each_field_that_differs_alone_is_refused_with_both_values(field):
    cache = Provenance(PROVENANCE)
    refuse_foreign(cache, {name: value for name, value in PROVENANCE.items() if name != "notes"}, "CACHE")
    refuse_foreign(cache, {}, "CACHE")
    value = {**PROVENANCE[field], "max_tokens": 5} if field == "truncation" else "other"
    with pytest.raises(CacheError, match=rf"CACHE: the cache was made with another {field}.*: (other|5) here, .* in the cache"):
        refuse_foreign(cache, {**PROVENANCE, field: value}, "CACHE")
    without = Provenance({name: value for name, value in PROVENANCE.items() if name != field})
    with pytest.raises(CacheError, match=f"another {field}: .* here, nothing in the cache"):
        refuse_foreign(without, {field: PROVENANCE[field]}, "CACHE")


def test_a_path_or_a_name_that_changed_is_no_difference(live, tmp_path):
    reader = record(tmp_path / "a", live, EXAMPLES[:3], FORMATS["top_k"])
    (tmp_path / "a").rename(tmp_path / "b")
    moved = CacheReader(str(tmp_path / "b"))
    refuse_foreign(moved.provenance, PROVENANCE | {"notes": {"path": "/elsewhere"}}, "b")
    assert CachedTeacher(moved, vocabulary_size=VOCABULARY).missing(EXAMPLES[:3]) == []
    assert moved.identity == reader.identity
    with pytest.raises(CacheError, match="over 320 tokens, and this run knows 321"):
        CachedTeacher(moved, vocabulary_size=VOCABULARY + 1)


def test_a_cache_that_is_still_written_serves_what_is_committed(live, tmp_path):
    format, codec = FORMATS["top_k"], make_codec(FORMATS["top_k"])
    first = record(tmp_path / "c", live, EXAMPLES[:4], format)
    teacher = CachedTeacher(first, vocabulary_size=VOCABULARY)
    batch = batches([[1, 7]])[0]
    with pytest.raises(CacheError, match=r"1 of 2 sequences of a batch \(examples 7\)"):
        teacher.score(batch, Needs("top_k"))
    other = record(tmp_path / "d", live, EXAMPLES, format)
    with CacheWriter(str(tmp_path / "c"), Provenance(PROVENANCE), format, writer="second") as writer:
        for index in range(4, 9):
            writer.add(EXAMPLES.digest(index), other.rows(EXAMPLES.digest(index)), codec.encode(other.read([EXAMPLES.digest(index)])))
        assert teacher.missing(EXAMPLES) == [4, 5, 6, 7, 8]
        writer.commit()
        assert torch.equal(teacher.score(batch, Needs("top_k")).outcomes.ids, CachedTeacher(other, vocabulary_size=VOCABULARY)
                           .score(batch, Needs("top_k")).outcomes.ids)  # fmt: skip
        assert teacher.missing(EXAMPLES) == []


# ---------------------------------------------------------------- the head


def test_a_head_comes_back_as_it_was():
    full = Head(torch.randn(7, 3), torch.randn(7), 0.125, 30.0, (LowRank(torch.randn(2, 3), torch.randn(7, 2), 1 / 3),))
    for head in (full, Head(torch.randn(7, 3).bfloat16()), replace(full, bias=None, low_rank=())):
        again = head_from_bytes(head_to_bytes(head))
        rows = torch.randn(4, 3)
        assert torch.equal(again.logits(rows), head.logits(rows))
        assert again.weight.dtype == head.weight.dtype
    tied = tiny_llama(tied=True)
    assert torch.equal(head_from_bytes(head_to_bytes(CausalLM(tied, 320).head())).weight, tied.model.embed_tokens.weight)
    for data in (b"", b"\x01", b"\x02" + b"\0" * 7 + b"{}", head_to_bytes(full)[:-1], head_to_bytes(full).replace(b'"head"', b'"head_"')):
        with pytest.raises(StorageError, match=r"head\.safetensors does not hold a teacher's head"):
            head_from_bytes(data)
