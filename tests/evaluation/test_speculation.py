"""The student as a draft: rounds counted on the teacher's text equal those of drafting and checking, enumerated and in transformers."""

import itertools

import numpy as np
import pytest
import torch

from potstill.batch import Example
from potstill.data.collation import collate
from potstill.evaluation.scores import Formula
from potstill.evaluation.speculation import ACCEPTED, KEPT, MATCHED, accept_batch, accept_rows, expected_rounds, seconds_of_tokens
from potstill.evaluation.speculation_task import metrics_of
from potstill.models.causal_lm import CausalLM
from tiny import tiny_llama

VOCABULARY, SIZE, LENGTH = 320, 3, 5


def chains(seed: int):
    """The next token's distributions of a student and a teacher, float64 [SIZE], as functions of the text so far."""
    generator = np.random.default_rng(seed)
    tables = [generator.dirichlet(np.full(SIZE, 0.7), size=SIZE**3) for _ in range(2)]

    def number(text: tuple[int, ...]) -> int:
        return sum(token * SIZE**place for place, token in enumerate(text[-3:])) % SIZE**3

    return [lambda text, table=table: table[number(text)] for table in tables]


def one_round(student, teacher, text, drafts):
    """Every way that one round can go on from a text: (what is emitted, its probability). Drafting and checking as the paper has it."""
    for drafted in itertools.product(range(SIZE), repeat=drafts):
        chance = np.prod([student((*text, *drafted[:place]))[token] for place, token in enumerate(drafted)])
        for place, token in enumerate(drafted):
            q, p = student((*text, *drafted[:place])), teacher((*text, *drafted[:place]))
            keep = min(1.0, p[token] / q[token])
            rest = np.clip(p - q, 0, None)
            if keep < 1:
                for other in range(SIZE):
                    yield (*drafted[:place], other), chance * (1 - keep) * rest[other] / rest.sum()
            chance *= keep
        for other in range(SIZE):
            yield (*drafted, other), chance * teacher((*text, *drafted))[other]


def rounds_enumerated(student, teacher, drafts):
    """(probability of each text of LENGTH tokens, mean number of rounds) by following every way of every round."""
    ends: dict[tuple[int, ...], float] = {}
    open_texts, rounds = {(): 1.0}, 0.0
    while open_texts:
        rounds += sum(open_texts.values())
        following: dict[tuple[int, ...], float] = {}
        for text, chance in open_texts.items():
            for emitted, share in one_round(student, teacher, text, drafts):
                longer = (*text, *emitted)[:LENGTH]
                kind = ends if len(longer) == LENGTH else following
                kind[longer] = kind.get(longer, 0.0) + chance * share
        open_texts = following
    return ends, rounds


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_text_is_the_teachers_and_the_rounds_are_those_that_were_counted_on_it(seed, drafts):
    student, teacher = chains(seed)
    ends, rounds = rounds_enumerated(student, teacher, drafts)
    counted = 0.0
    for text in itertools.product(range(SIZE), repeat=LENGTH):
        before = [text[:place] for place in range(LENGTH)]
        chance = np.prod([teacher(seen)[token] for seen, token in zip(before, text, strict=True)])
        assert ends[text] == pytest.approx(chance, abs=1e-12)
        q, p = (torch.tensor(np.stack([chain(seen) for seen in before])).log() for chain in (student, teacher))
        counted += chance * expected_rounds(accept_rows(q, p, torch.tensor(text))[:, KEPT].numpy(), drafts)
    assert counted == pytest.approx(rounds, abs=1e-10)


def test_a_perfect_draft_is_always_kept_and_a_useless_one_never():
    assert expected_rounds(np.ones(10), 4) == 2
    assert expected_rounds(np.zeros(7), 4) == 7
    assert expected_rounds(np.ones(11), 4) == 3


def test_the_fixture_of_independent_places():
    student, teacher = (torch.tensor([row], dtype=torch.float64).log() for row in ((0.4, 0.1, 0.3, 0.2), (0.5, 0.3, 0.15, 0.05)))
    accepted = accept_rows(student, teacher, torch.tensor([0]))[0, ACCEPTED].item()
    assert accepted == pytest.approx(0.7)
    metric = metrics_of((4,))["independent_tokens_per_round_4"]
    statistic = metric.formula.statistic(("accepted", "drafts of 4", "targets"))
    assert statistic(np.array([accepted * 10, 40, 10])) == pytest.approx(2.7731)
    assert statistic(np.array([10.0, 40, 10])) == 5
    # Long text whose places are independent yields what the formula says.
    assert 200_000 / expected_rounds(np.full(200_000, 0.7), 4) == pytest.approx(2.7731, rel=1e-4)
    assert Formula("drafting", ("a", "b", "c")).statistic(("a", "b", "c"))(np.array([0.0, 4, 1])) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_rows_equal_their_definition_in_probabilities(temperature):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 50, 11)) * 2
    tokens = generator.integers(0, 11, 50)
    q, p = (np.exp(one / temperature) / np.exp(one / temperature).sum(axis=1, keepdims=True) for one in logits)
    expected = np.stack([
        np.minimum(p, q).sum(axis=1), q.argmax(axis=1) == p.argmax(axis=1),
        np.minimum(1, q[np.arange(50), tokens] / p[np.arange(50), tokens]),
    ], axis=1)  # fmt: skip
    student, teacher = (torch.from_numpy(one).log_softmax(-1) for one in logits)
    found = accept_rows(student, teacher, torch.from_numpy(tokens), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    # Over the teacher's tokens, what is kept is what both have in common.
    every = torch.stack([accept_rows(student, teacher, torch.full((50,), token), temperature)[:, KEPT] for token in range(11)], dim=1)
    np.testing.assert_allclose((every.numpy() * p).sum(axis=1), expected[:, ACCEPTED], rtol=1e-10)


def test_greedily_a_draft_is_kept_where_both_choose_the_same():
    student, teacher = torch.tensor([[0.6, 0.4], [0.4, 0.6]]).log(), torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    found = accept_rows(student, teacher, torch.tensor([0, 0]), temperature=0)
    assert found.tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.fixture(scope="module")
def pair():
    """A teacher, and a student that agrees with it often: the same weights, disturbed."""
    models = [tiny_llama(0, layers=1) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for model in models:
            model.lm_head.weight.mul_(12.0)
        for weight in models[0].parameters():
            weight += 0.2 * weight.std(unbiased=False) * torch.randn(weight.shape, generator=generator)
    return CausalLM(models[0], VOCABULARY), CausalLM(models[1], VOCABULARY)


def kept_of(pair, text: torch.Tensor, prompt: int) -> np.ndarray:
    marks = [False] * prompt + [True] * (len(text) - prompt)
    batch = collate([[Example(text.tolist(), marks, 7)]], pad_token=0)
    ((index, rows),) = accept_batch(*pair[:1], batch, pair[1], 1.0)
    assert index == 7
    return rows


def test_rows_of_a_batch_stand_at_their_documents(pair):
    texts = [torch.arange(3, 20), torch.arange(30, 40), torch.arange(50, 75)]
    examples = [Example(text.tolist(), [False] * 4 + [True] * (len(text) - 4), 10 + number) for number, text in enumerate(texts)]
    found = accept_batch(pair[0], collate([[one] for one in examples], pad_token=0), pair[1], 1.0)
    for number, (index, rows) in enumerate(found):
        assert index == 10 + number
        logits = [model.model(input_ids=texts[number][None]).logits[0, 3:-1].double() for model in pair]
        q, p = (one.softmax(-1).detach().numpy() for one in logits)
        np.testing.assert_allclose(rows[:, ACCEPTED], np.minimum(p, q).sum(axis=1), rtol=1e-4)
        np.testing.assert_array_equal(rows[:, MATCHED], q.argmax(axis=1) == p.argmax(axis=1))


@pytest.mark.parametrize("drafts", [2, 4])
def test_assisted_generation_of_transformers_takes_the_rounds_that_are_predicted(pair, drafts):
    """Real speculative sampling: the teacher's forwards are counted, and the rounds expected on the texts that came out of it."""
    student, teacher = (model.model for model in pair)
    student.generation_config.update(
        num_assistant_tokens=drafts, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0, eos_token_id=None
    )
    for model in (student, teacher):
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
    counted, expected, tokens = 0, 0.0, 0
    looks = []
    handle = teacher.model.register_forward_hook(lambda *_: looks.append(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts = [
            teacher.generate(
                torch.tensor([[5, 6, 7 + number]]), attention_mask=torch.ones(1, 3, dtype=torch.long), assistant_model=student,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=48,
            )[0] for number in range(24)
        ]  # fmt: skip
    handle.remove()
    counted = len(looks)
    for text in texts:
        kept = kept_of(pair, text, 3)[:, KEPT]
        tokens += len(kept)
        expected += expected_rounds(kept, drafts)
    assert 1.4 < tokens / counted < drafts + 0.8
    assert counted == pytest.approx(expected, rel=0.05)


def test_the_clock_runs_for_every_token(pair):
    few, many = (min(seconds_of_tokens(pair[0], [5, 6], list(range(5, 5 + count)), VOCABULARY) for _ in range(3)) for count in (2, 40))
    assert 0 < few < many
