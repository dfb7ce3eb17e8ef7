"""The mixture of teacher and student in probability space, and text that is drawn from it with a cache for each."""

import pytest
import torch

from potstill.errors import IncompatibleError
from potstill.models.causal_lm import CausalLM
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.mixed import mixture
from potstill.rollouts.writing import Prompt, Sampling, seed_of
from tiny import tiny_llama


def _logits(seed: int) -> torch.Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 1.0])
def test_the_mixture_is_one_of_probabilities(share, temperature):
    student, teacher = _logits(0), _logits(1)
    found = mixture(student, teacher, share, Sampling(temperature=temperature))
    expected = share * (teacher.double() / temperature).softmax(-1) + (1 - share) * (student.double() / temperature).softmax(-1)
    assert torch.allclose(found.double().exp(), expected, atol=1e-6)
    assert torch.allclose(found.double(), expected.log(), atol=1e-5)


def test_a_token_that_only_one_of_them_knows_keeps_its_share():
    student, teacher = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert mixture(student, teacher, 0.25, Sampling()).exp()[0].tolist() == pytest.approx([0.75, 0.25])


# ---------------------------------------------------------------- the generator

PROMPTS = [
    Prompt(tuple(range(3, 3 + length)), seed_of(4, row), teacher_tokens=tuple(range(9, 9 + length + row)) if row % 2 else None)
    for row, length in enumerate((4, 9, 2, 6))
]


def _generator(student, teacher, share: float) -> LocalGenerator:
    return LocalGenerator(CausalLM(student, 96), stop_ids=range(2, 8), pad_token=0, teacher=CausalLM(teacher, 96), teacher_share=share)


def _probabilities(model, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    tokens = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().softmax(-1)


def test_log_probabilities_are_of_the_mixture_and_the_teacher_reads_its_own_prompt():
    student, teacher = tiny_llama(0, vocabulary_size=96), tiny_llama(1, vocabulary_size=96, width=48, layers=3)
    answers = _generator(student, teacher, 0.3).generate(PROMPTS, Sampling(max_new_tokens=24))
    assert len({len(answer.tokens) for answer in answers}) > 1
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        q = _probabilities(student, prompt.tokens, answer.tokens)
        p = _probabilities(teacher, prompt.teacher_tokens or prompt.tokens, answer.tokens)
        drawn = (0.3 * p + 0.7 * q)[range(len(answer.tokens)), list(answer.tokens)]
        assert list(answer.log_probs) == pytest.approx(drawn.log().tolist(), abs=1e-5)


@pytest.mark.parametrize(("share", "alone"), [(0.0, 0), (1.0, 1)])
def test_at_either_end_one_of_them_writes_alone(share, alone):
    models = tiny_llama(0, vocabulary_size=96), tiny_llama(1, vocabulary_size=96)
    prompts = [Prompt(prompt.tokens, prompt.seed) for prompt in PROMPTS]
    mixed = _generator(*models, share).generate(prompts, Sampling(max_new_tokens=24))
    single = LocalGenerator(CausalLM(models[alone], 96), stop_ids=range(2, 8), pad_token=0).generate(prompts, Sampling(max_new_tokens=24))
    assert [answer.tokens for answer in mixed] == [answer.tokens for answer in single]


def test_truncation_is_of_the_mixture():
    models = tiny_llama(0, vocabulary_size=96), tiny_llama(1, vocabulary_size=96)
    prompts = [Prompt((5, 6, 7), seed) for seed in range(200)]
    answers = _generator(*models, 0.5).generate(prompts, Sampling(temperature=0.5, top_k=3, max_new_tokens=1))
    q, p = ((model(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / 0.5).softmax(-1) for model in models)
    values, ids = (0.5 * p + 0.5 * q).topk(3)
    expected = dict(zip(ids.tolist(), (values / values.sum()).log().tolist(), strict=True))
    assert {answer.tokens[0] for answer in answers} == set(expected)
    for answer in answers:
        assert answer.log_probs[0] == pytest.approx(expected[answer.tokens[0]], abs=1e-5)


def test_greedy_takes_the_most_likely_of_the_mixture():
    models = tiny_llama(0, vocabulary_size=96), tiny_llama(1, vocabulary_size=96)
    answer = _generator(*models, 0.5).generate([Prompt((5, 6, 7), 0)], Sampling(temperature=0, max_new_tokens=1))[0]
    q, p = (model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1) for model in models)
    assert answer.tokens[0] == int((p + q).argmax())


def test_models_that_count_other_tokens_are_refused():
    with pytest.raises(IncompatibleError, match=r"96 tokens and .* 97"):
        LocalGenerator(
            CausalLM(tiny_llama(vocabulary_size=97), 96), stop_ids=[2], pad_token=0, teacher=CausalLM(tiny_llama(vocabulary_size=97), 97),
            teacher_share=0.2,
        )  # fmt: skip
