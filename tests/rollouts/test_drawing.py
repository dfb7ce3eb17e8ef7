"""Drawing against enumeration in float64, transformers' own processors, and chi-square on fixed seeds."""

import math

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from potstill.rollouts import drawing
from potstill.rollouts.drawing import draw, truncated, uniforms
from potstill.rollouts.writing import Sampling, seed_of


def _logits(rows: int, size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def _chi_square_limit(freedom: int) -> float:
    """About four standard deviations out (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


# ---------------------------------------------------------------- numbers


def test_a_number_is_a_function_of_seed_and_position_alone():
    seeds = [seed_of(0, row) for row in range(5)]
    together = uniforms(seeds, 3)
    assert together.tolist() == [float(uniforms([seed], 3)[0]) for seed in seeds]
    assert together.tolist() != uniforms(seeds, 4).tolist()


def _splitmix64(state: int, number: int) -> int:
    """The `number`-th output from 0 on, in Python's own integers."""
    word = (state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_numbers_are_those_of_splitmix64_and_never_change():
    assert _splitmix64(0, 0) == 0xE220A8397B1DCDAF  # the first number of the published generator from seed 0
    seeds = [0, 1, 2**63 - 1]
    for position in (0, 1, 4096):
        expected = [(_splitmix64(_splitmix64(seed, 0), position) >> 11) / 2**53 for seed in seeds]
        assert uniforms(seeds, position).tolist() == expected


@pytest.mark.parametrize("along", ["positions", "consecutive seeds", "hashed seeds"])
def test_numbers_are_uniform_and_neighbours_independent(along):
    count = 20_000
    if along == "positions":
        numbers = np.concatenate([uniforms([7], position) for position in range(count)])
    else:
        numbers = uniforms(list(range(count)) if along == "consecutive seeds" else [seed_of(1, row) for row in range(count)], 5)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    cells = (numbers * 16).astype(int)
    pairs = np.bincount(cells[:-1] * 16 + cells[1:], minlength=256)
    expected = (count - 1) / 256
    assert ((pairs - expected) ** 2 / expected).sum() < _chi_square_limit(255)


# ---------------------------------------------------------------- truncation


@pytest.mark.parametrize("first", [4, 1024])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 200])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
def test_truncation_is_that_of_transformers(monkeypatch, temperature, top_k, top_p, first):
    monkeypatch.setattr(drawing, "_FIRST", first)
    logits = _logits(6, 97)
    expected = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = truncated(logits, Sampling(temperature, top_p, top_k))
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    assert torch.equal(found[found > -torch.inf], expected[expected > -torch.inf])


def test_the_logits_that_are_given_are_left_as_they_are():
    logits = _logits(2, 300)
    before = logits.clone()
    draw(logits, uniforms([1, 2], 0), Sampling(top_k=5))
    draw(logits, uniforms([1, 2], 0), Sampling())
    assert torch.equal(logits, before)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("size", [3, 255, 256, 257, 700])
def test_tokens_are_those_of_the_inverse_distribution_function(size):
    logits = _logits(1, size).expand(500, -1)
    numbers = uniforms(range(500), 0)
    tokens, log_probs = draw(logits, numbers, Sampling(temperature=0.8))
    weights = np.exp(logits[0].double().numpy() / 0.8)
    edges = np.cumsum(weights / weights.sum())
    expected = np.searchsorted(edges, numbers, side="right")
    # Within rounding of an edge either neighbour is right.
    near = np.abs(edges[np.minimum(expected, size - 1)] - numbers) < 1e-6
    assert ((tokens.numpy() == expected) | near).all()
    assert np.allclose(log_probs.numpy(), np.log(weights / weights.sum())[tokens.numpy()], atol=2e-6)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.7), Sampling(top_k=4), Sampling(top_p=0.8), Sampling(0.6, 0.9, 6)])
def test_frequencies_are_those_of_the_distribution(sampling):
    logits, count = _logits(1, 11, seed=4, scale=1.5), 20_000
    tokens, log_probs = draw(logits.expand(count, -1), uniforms(range(count), 9), sampling)
    expected = truncated(logits, sampling)[0].double().softmax(-1)
    seen = torch.bincount(tokens, minlength=11).double()
    possible = expected > 0
    assert seen[~possible].sum() == 0
    statistic = ((seen - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    assert statistic < _chi_square_limit(int(possible.sum()) - 1)
    assert torch.allclose(log_probs, expected.log().float()[tokens], atol=1e-6)


def test_a_token_of_no_weight_is_never_drawn_at_either_end():
    logits = torch.full((4, 600), -torch.inf)
    logits[:, [10, 300, 511]] = 0.0
    numbers = np.array([0.0, 0.5, 1 - 2.0**-53, np.nextafter(1.0, 0)])
    tokens, log_probs = draw(logits, numbers, Sampling())
    assert tokens.tolist() == [10, 300, 511, 511]
    assert torch.allclose(log_probs, torch.full((4,), -math.log(3)))


def test_an_aim_that_rounding_has_put_beyond_all_finds_the_last_token_of_any_weight():
    sums = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.5, 0.75, 1.0, 1.0]], dtype=torch.float64)
    assert drawing._first_beyond(sums, torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)).tolist() == [1, 2]


def test_greedy_takes_the_most_likely_and_is_certain():
    logits = _logits(4, 50)
    tokens, log_probs = draw(logits, uniforms(range(4), 0), Sampling(temperature=0, top_k=3))
    assert torch.equal(tokens, logits.argmax(-1))
    assert log_probs.tolist() == [0.0] * 4


def test_torch_is_not_asked_for_random_numbers():
    before = torch.get_rng_state()
    draw(_logits(2, 20), uniforms([1, 2], 0), Sampling())
    assert torch.equal(torch.get_rng_state(), before)
