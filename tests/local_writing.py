"""Prompts of unequal lengths, a local generator for tiny models, and transformers' own greedy answers to compare with."""

import torch

from potstill.models.causal_lm import CausalLM
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.writing import Prompt, seed_of

STOPS = [2, 50, 51]
LENGTHS = (5, 1, 9, 3, 12, 7)


def tokens_of(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


PROMPTS = [Prompt(tokens_of(length, row), seed_of(0, row)) for row, length in enumerate(LENGTHS)]


def local_generator(model, **changes) -> LocalGenerator:
    return LocalGenerator(CausalLM(model, 96), **{"stop_ids": STOPS, "pad_token": 0, **changes})


def greedy_by_transformers(model, prompts: list[Prompt], count: int) -> list[list[int]]:
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
