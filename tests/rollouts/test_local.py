"""The local generator: transformers' own greedy text on every family, and answers that depend on their own seed alone."""

import pytest
import torch

from potstill.errors import ModelError, UsageError
from potstill.models.causal_lm import CausalLM
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.writing import Prompt, Sampling, seed_of
from tiny import tiny_llama
from tiny_families import FAMILIES, family_model

STOPS = [2, 50, 51]
LENGTHS = (5, 1, 9, 3, 12, 7)


def _tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


PROMPTS = [Prompt(_tokens(length, row), seed_of(0, row)) for row, length in enumerate(LENGTHS)]


def _generator(model, **changes) -> LocalGenerator:
    return LocalGenerator(CausalLM(model, 96), **{"stop_ids": STOPS, "pad_token": 0, **changes})


def _greedy_by_transformers(model, prompts: list[Prompt], count: int) -> list[list[int]]:
    """One prompt at a time, so that no padding is in it either."""
    answers = []
    for prompt in prompts:
        given = torch.tensor([prompt.tokens])
        found = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False,
            eos_token_id=STOPS, pad_token_id=0,
        )
        answers.append(found[0, len(prompt.tokens) :].tolist())
    return answers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mamba"}))
def test_greedy_text_is_that_of_transformers_token_for_token(family):
    model = family_model(family)
    found = _generator(model).generate(PROMPTS, Sampling(temperature=0, max_new_tokens=20))
    assert [list(answer.tokens) for answer in found] == _greedy_by_transformers(model, PROMPTS, 20)
    for answer in found:
        assert answer.ended == (answer.tokens[-1] in STOPS)
        assert answer.ended or len(answer.tokens) == 20


def test_a_family_without_a_key_value_cache_is_refused_by_name():
    with pytest.raises(ModelError, match="MambaForCausalLM keeps no key-value cache"):
        _generator(family_model("mamba"))


def test_an_answer_depends_on_its_own_seed_and_prompt_alone():
    model = tiny_llama(vocabulary_size=96)
    sampling = Sampling(max_new_tokens=20)
    together = _generator(model).generate(PROMPTS, sampling)
    assert len({len(answer.tokens) for answer in together}) > 2  # rows left the batch at different tokens
    for size in (1, 2, 4):
        for answer, other in zip(together, _generator(model, batch_size=size).generate(PROMPTS, sampling), strict=True):
            assert other.tokens == answer.tokens
            assert other.log_probs == pytest.approx(answer.log_probs, abs=1e-5)
    backwards = _generator(model).generate(PROMPTS[::-1], sampling)[::-1]
    assert [answer.tokens for answer in backwards] == [answer.tokens for answer in together]


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="prompt 1 has no token"):
        _generator(tiny_llama(vocabulary_size=96)).generate([PROMPTS[0], Prompt((), 1)], Sampling())


def test_no_prompts_no_answers():
    assert _generator(tiny_llama(vocabulary_size=96)).generate([], Sampling()) == []
