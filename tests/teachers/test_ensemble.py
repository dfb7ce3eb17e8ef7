"""A mixture is the mean of probabilities, in float64 in probability space; a routed ensemble is each teacher alone on its rows."""

from dataclasses import replace

import pytest
import torch

from potstill.cache.records import RecordFormat
from potstill.data.collation import collate, empty_batch
from potstill.errors import CacheError, IncompatibleError
from potstill.models.causal_lm import CausalLM
from potstill.objectives.distribution import DistributionMatching
from potstill.signals import FullOutcomes, MixtureOutcomes, Needs, Offers, RoutedOutcomes, TopKOutcomes
from potstill.teachers.cached import CachedTeacher
from potstill.teachers.ensemble import MixtureTeacher, RoutedTeacher
from potstill.teachers.teacher import Teacher, require, require_answers
from potstill.training.distiller import Distiller
from recorded import VOCABULARY, example_set, local_teacher, record
from tiny import tiny_llama

ROUTES = ("maths", "code", "code", "maths", "maths")
EXAMPLES = example_set(10, routes=ROUTES)
HIDDEN = RecordFormat("hidden", VOCABULARY, width=32)
TOP_K = RecordFormat("top_k", VOCABULARY, k=16, exact=True)


@pytest.fixture(scope="module")
def members():
    return {"maths": local_teacher(5), "code": local_teacher(6, layers=1)}


def batch_of(*rows, examples=EXAMPLES):
    return collate([[examples[index] for index in row] for row in rows], pad_token=0)


PACKED = batch_of([4, 0, 7], [2], [8, 1, 3, 9], [6, 5])
PADDED = batch_of(*[[index] for index in range(10)])


def probabilities(teacher, batch):
    """The teacher's distributions for the target rows, in float64."""
    outcomes = teacher.score(batch, Needs("full")).outcomes
    assert isinstance(outcomes, FullOutcomes)
    return (outcomes.hidden.double() @ outcomes.head.weight.double().T).softmax(-1)


def learn(teacher, batch, **objective):
    student = CausalLM(tiny_llama(11, width=16, initializer_range=0.2), VOCABULARY)
    matching = DistributionMatching(**{"kd_ratio": 1.0, "vocabulary_size": VOCABULARY, **objective})
    require(teacher, matching.needs)
    _, _, divergence = sums = Distiller(student, matching)(batch, teacher.score(batch, matching.needs))
    sums[0].backward()
    return divergence.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def reference(wanted, batch):
    """Sum of KL(wanted || student) and its gradient, by autograd from whole logits in float64."""
    student = tiny_llama(11, width=16, initializer_range=0.2)
    rows = []
    for document in batch.sequences():
        logits = student(input_ids=document.tokens[None]).logits[0, :-1]
        rows.append(logits[document.is_target[1:]])
    q = torch.cat(rows).double().softmax(-1)
    total = (wanted * (wanted.log() - q.log())).sum()
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def close(found, expected, tolerance=1e-5):
    assert expected[0] > 1
    scale = float(expected[1].abs().max())
    return abs(found[0] / expected[0] - 1) < tolerance and float((found[1] - expected[1]).abs().max()) < tolerance * scale


# ---------------------------------------------------------------- mixtures


@pytest.mark.parametrize("weights", [None, {"maths": 3.0, "code": 1.0}, {"code": 1e-3, "maths": 2e-3}])
@pytest.mark.parametrize("batch", [PACKED, PADDED], ids=["packed", "padded"])
def test_a_mixture_is_the_mean_of_the_probabilities(members, weights, batch):
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()} if weights else {"maths": 0.5, "code": 0.5}
    mean = sum(share * probabilities(members[name], batch) for name, share in shares.items())
    teacher: Teacher = MixtureTeacher(members, weights)
    outcomes = teacher.score(batch, Needs("full")).outcomes
    assert isinstance(outcomes, MixtureOutcomes)
    assert sum(outcomes.weights) == pytest.approx(1)
    assert close(learn(teacher, batch), reference(mean, batch))
    assert not close(learn(members["maths"], batch), reference(mean, batch))  # the comparison can fail


def test_a_mixture_of_a_live_and_a_recorded_teacher_is_the_same(members, tmp_path):
    reader = record(tmp_path / "hidden", members["code"], EXAMPLES, HIDDEN)
    mixed = MixtureTeacher({"maths": members["maths"], "code": CachedTeacher(reader, vocabulary_size=VOCABULARY)})
    assert close(learn(mixed, PACKED), learn(MixtureTeacher(members), PACKED), 1e-6)
    assert mixed.identity == {"ensemble": "mean of 0.5 maths, 0.5 code", "code: teacher cache": reader.identity}
    with pytest.raises(CacheError, match="1 of 11 sequences have no answer"):
        require_answers(mixed, example_set(11, routes=ROUTES))


def test_a_mixture_serves_what_asks_for_less(members):
    kept = learn(MixtureTeacher(members), PACKED, support="top_k_tail", parameters={"top_k": VOCABULARY})
    mean = sum(0.5 * probabilities(member, PACKED) for member in members.values())
    assert close(kept, reference(mean, PACKED))
    assert MixtureTeacher(members).score(PACKED, Needs()).outcomes is None


def test_a_mean_needs_whole_distributions_of_every_member(members, tmp_path):
    cached = CachedTeacher(record(tmp_path / "c", members["code"], EXAMPLES, TOP_K), vocabulary_size=VOCABULARY)
    with pytest.raises(IncompatibleError, match=r"teacher\.teachers\.code: the cache .* offers top_k outcomes, and a mean needs full ones"):
        MixtureTeacher({"maths": members["maths"], "code": cached})
    for weights, words in [({"maths": 1.0}, "they name"), ({"maths": 1.0, "code": 0.0}, "code has 0.0"),
                           ({"maths": float("nan"), "code": 1.0}, "maths has nan")]:  # fmt: skip
        with pytest.raises(IncompatibleError, match=rf"teacher\.weights: one positive number for each .*; {words}"):
            MixtureTeacher(members, weights)
    with pytest.raises(IncompatibleError, match="name at least one"):
        MixtureTeacher({})


# ---------------------------------------------------------------- routes


@pytest.mark.parametrize("batch", [PACKED, PADDED, batch_of([1], [2]), batch_of([3, 0])], ids=["packed", "padded", "code", "maths"])
def test_each_teacher_answers_its_own_rows(members, batch):
    teacher: Teacher = RoutedTeacher(members)
    outcomes = teacher.score(batch, Needs("full")).outcomes
    assert isinstance(outcomes, RoutedOutcomes)
    assert len(outcomes) == batch.num_targets
    wanted = torch.cat([probabilities(members[d.route], batch)[d.rows] for d in batch.sequences()])
    found = torch.zeros_like(wanted)
    for rows, part in outcomes.parts:
        found[rows] = (part.hidden.double() @ part.head.weight.double().T).softmax(-1)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert close(learn(teacher, batch), reference(wanted, batch))


def test_a_member_sees_its_own_documents_alone_and_in_their_rows(members):
    class Watched:
        name, offers, identity = "watched", Offers(frozenset({"full"})), {}

        def __init__(self, inner):
            self.inner, self.seen = inner, []

        def score(self, batch, needs):
            self.seen.append(batch)
            return self.inner.score(batch, needs)

        def close(self):
            self.seen.append("closed")

    watched = {name: Watched(member) for name, member in members.items()}
    teacher = RoutedTeacher(watched)
    teacher.score(PACKED, Needs("full"))
    assert [batch.examples for batch in (watched["maths"].seen[0], watched["code"].seen[0])] == [(4, 0, 8, 3, 9, 5), (7, 2, 1, 6)]
    assert [len(w.seen[0].tokens) for w in watched.values()] == [3, 4]  # rows of the batch that hold a document of theirs
    assert all(w.seen[0].tokens.shape[1] <= PACKED.tokens.shape[1] for w in watched.values())
    teacher.score(batch_of([1]), Needs("full"))
    assert watched["maths"].seen[1].num_tokens == 0  # asked with padding: a sharded member takes part on every rank
    teacher.close()
    assert all(w.seen[-1] == "closed" for w in watched.values())


def test_recorded_and_live_members_answer_side_by_side(members, tmp_path):
    format = replace(TOP_K, k=VOCABULARY)
    cached = CachedTeacher(record(tmp_path / "c", members["code"], EXAMPLES, format), vocabulary_size=VOCABULARY)
    teacher = RoutedTeacher({"maths": members["maths"], "code": cached})
    assert teacher.offers == Offers(frozenset({"top_k"}), VOCABULARY, 1.0)
    outcomes = teacher.score(PACKED, Needs("top_k")).outcomes
    assert [type(part) for _, part in outcomes.parts] == [FullOutcomes, TopKOutcomes]
    parameters = {"top_k": VOCABULARY}
    assert close(learn(teacher, PACKED, support="top_k_tail", parameters=parameters),
                 learn(RoutedTeacher(members), PACKED, support="top_k_tail", parameters=parameters))  # fmt: skip
    # The cache must hold the rows that are its own, and no others.
    only = EXAMPLES.select([index for index in range(len(EXAMPLES)) if EXAMPLES.route(index) == "code"])
    small = CachedTeacher(record(tmp_path / "d", members["code"], only, format), vocabulary_size=VOCABULARY)
    require_answers(RoutedTeacher({"maths": members["maths"], "code": small}), EXAMPLES)
    with pytest.raises(CacheError, match=r"5 of 6 sequences have no answer .* first is train\.jsonl:1"):
        require_answers(RoutedTeacher({"code": members["code"], "maths": small}), EXAMPLES)


def test_a_rank_without_rows_gets_answers_without_rows(members):
    outcomes = RoutedTeacher(members).score(empty_batch(pad_token=0), Needs("full")).outcomes
    assert len(outcomes) == 0
    assert RoutedTeacher(members).score(PACKED, Needs()).outcomes is None


def test_a_route_that_no_teacher_has_is_refused_with_its_row(members):
    with pytest.raises(IncompatibleError, match=r"train\.jsonl:2: the row is for 'code', and the teachers are maths"):
        require_answers(RoutedTeacher({"maths": members["maths"]}), EXAMPLES)
    with pytest.raises(IncompatibleError, match="a row of the batch is for 'code'"):
        RoutedTeacher({"maths": members["maths"]}).score(PACKED, Needs("full"))
    with pytest.raises(IncompatibleError, match=r"train\.jsonl:1: the row is for 'nobody'"):
        require_answers(RoutedTeacher(members), example_set(3))


class Offering:
    def __init__(self, *outcomes, **limits):
        self.offers, self.identity, self.name = Offers(frozenset(outcomes), **limits), {"k": "v"}, "the fake"

    def score(self, batch, needs):
        raise AssertionError

    def close(self):
        """Nothing."""


def test_it_offers_what_every_member_offers():
    full, sampled = Offering("full"), Offering("sampled", "top_k", top_k=9, temperature=1.0)
    assert "full" in RoutedTeacher({"a": full, "b": full}).offers.outcomes
    assert RoutedTeacher({"a": full, "b": sampled}).offers == Offers(frozenset({"sampled", "top_k"}), 9, 1.0)
    both = RoutedTeacher({"a": Offering("top_k", top_k=20, temperature=1.0), "b": sampled})
    assert both.offers == Offers(frozenset({"top_k"}), 9, 1.0)
    assert both.identity == {"ensemble": "each row to one of a, b", "a: k": "v", "b: k": "v"}
    with pytest.raises(IncompatibleError, match="no outcomes are offered by all of them: a offers projected; b offers sampled or top_k"):
        RoutedTeacher({"a": Offering("projected"), "b": sampled})
    with pytest.raises(IncompatibleError, match="at different temperatures: a at 2, b at 1; capture them at one"):
        RoutedTeacher({"a": Offering("top_k", top_k=20, temperature=2.0), "b": sampled})
