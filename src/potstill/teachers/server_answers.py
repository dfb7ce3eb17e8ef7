"""When a server's answer for one prompt is believed, and what is made of it. Knows arrays, and no JSON and no HTTP.

Everything is looked at before anything is used: ids, order, finiteness, mass, and the token that really came.
"""

from dataclasses import dataclass

import numpy as np

from potstill.serving.endpoint import Unbelievable

# Rows that heads have beyond their tokenizer are padding to a multiple; a server that names ids further out serves another vocabulary.
PADDED_ROWS = 1024
_EPSILON = 1e-3              # of a mass or a log-probability: servers round in float32 at worst
_SMALLEST_TAIL = 1e-9        # below it 1 - sum of float32 log-probabilities is rounding


@dataclass(frozen=True)
class Scored:
    """What a server says of one prompt of T tokens: row t is the distribution that predicted token t + 1. K may be 0."""

    ids: np.ndarray          # int64 [T - 1, K], most likely first
    log_probs: np.ndarray    # float64 [T - 1, K]
    actual: np.ndarray       # float64 [T - 1]: of the token that came, kept or not
    texts: dict[int, str]    # what the server calls its ids, where it says so


@dataclass(frozen=True)
class Kept:
    """The same, cut to a vocabulary: what becomes TopKOutcomes."""

    ids: np.ndarray          # int64 [T - 1, K]
    log_probs: np.ndarray    # float32 [T - 1, K]
    log_tail: np.ndarray     # float32 [T - 1]
    actual: np.ndarray       # float32 [T - 1]


def believe(scored: Scored, prompt: list[int], k: int, most_ids: int) -> None:
    """Raises Unbelievable, saying what is wrong and at which token, unless all of it can be true."""
    rows, ids, log_probs, actual = len(prompt) - 1, scored.ids, scored.log_probs, scored.actual
    if ids.shape != (rows, k) or log_probs.shape != (rows, k) or actual.shape != (rows,):
        raise Unbelievable(f"{ids.shape} ids and {log_probs.shape} log-probabilities for {rows} tokens and top_k {k}")
    _require(np.isfinite(actual) & (actual <= _EPSILON), "a log-probability of the token that came that is none", actual)
    if not rows or not k:
        return
    _require(np.isfinite(log_probs) & (log_probs <= _EPSILON), "a log-probability that is none", log_probs)
    _require((ids >= 0) & (ids < most_ids), f"an id outside the vocabulary of {most_ids:,}", ids)
    ordered = np.sort(ids, axis=1)
    _require(ordered[:, 1:] != ordered[:, :-1], "an id that stands twice", ordered[:, 1:])
    _require(log_probs[:, 1:] <= log_probs[:, :-1] + 1e-6, "a log-probability above that of a better rank", log_probs[:, 1:])
    mass = np.exp(log_probs).sum(1)
    _require(mass <= 1 + _EPSILON, "a mass above 1", mass)
    # What is left is spread over ids that are each no likelier than the last kept one.
    most = mass + max(most_ids - k, 0) * np.exp(log_probs[:, -1]) * (1 + _EPSILON)
    _require(most >= 1 - _EPSILON, "a mass that does not reach 1 with all other ids at the last one's rank", most)
    came = ids == np.asarray(prompt[1:])[:, None]
    kept, last = came.any(1), log_probs[:, -1]
    stated = np.where(kept, (log_probs * came).sum(1), np.minimum(actual, last + 1e-6))
    _require(np.abs(stated - actual) <= _EPSILON, "a token that came whose log-probability contradicts its rank", actual)


def _require(holds: np.ndarray, wrong: str, found: np.ndarray) -> None:
    if holds.all():
        return
    place = tuple(int(index) for index in np.argwhere(~holds)[0])
    raise Unbelievable(f"{wrong}: {found[place]} at token {place[0] + 1}")


def cut_to(scored: Scored, vocabulary_size: int) -> Kept:
    """Ids beyond the vocabulary are not kept: their mass goes to the tail, as does all that was not asked for.

    Their places go to the end of the row and are filled with its first id at log-probability -inf: an id that stands twice counts once,
    and one without mass not at all.
    """
    if not scored.ids.shape[1]:  # nothing was asked for but the token that came
        nothing = np.zeros(len(scored.actual), np.float32)
        return Kept(scored.ids, scored.log_probs.astype(np.float32), nothing, scored.actual.astype(np.float32))
    real = scored.ids < vocabulary_size
    order = np.argsort(~real, axis=1, kind="stable")
    ids = np.take_along_axis(scored.ids, order, axis=1)
    log_probs = np.where(real, scored.log_probs, -np.inf)
    log_probs = np.take_along_axis(log_probs, order, axis=1)
    real = np.take_along_axis(real, order, axis=1)
    filling = np.where(real[:, :1], ids[:, :1], 0)
    ids = np.where(real, ids, filling)
    return Kept(ids, log_probs.astype(np.float32), _log_tail(scored, log_probs, real, vocabulary_size), scored.actual.astype(np.float32))


def _log_tail(scored: Scored, log_probs: np.ndarray, real: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """log(1 - mass of what is kept), in float64, floored where it is rounding; exactly log 0 where the whole vocabulary is kept."""
    left = 1.0 - np.exp(log_probs).sum(1)
    outside = np.exp(scored.actual) * (scored.actual < log_probs.min(1))  # the token that came is in the tail, and so its mass
    tail = np.log(np.clip(np.maximum(left, outside), _SMALLEST_TAIL, 1.0))
    return np.where(real.sum(1) >= vocabulary_size, -np.inf, tail).astype(np.float32)
