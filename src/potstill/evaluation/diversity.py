"""How much the answers of a model differ from each other: distinct n-grams under a fixed budget, and self-BLEU. Pure functions of texts.

The words are lower-cased runs of letters and digits, and marks one by one, whatever the model's tokenizer: so that models with other
tokenizers can be compared, and a budget is the same amount of text for all.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from potstill.errors import ConfigError

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """"It's 5." is it ' s 5 and a full stop."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Every run of n tokens, in order."""
    return [tuple(tokens[place : place + n]) for place in range(len(tokens) - n + 1)]


def first_of_each(lengths: Sequence[int], budget: int) -> list[int] | None:
    """How many to take from the front of each of several lists so that it is `budget` in all, as evenly as their lengths allow.

    None where all of them together hold fewer.
    """
    if sum(lengths) < budget:
        return None
    low, high = 0, max(lengths, default=0)
    while low < high:  # the largest cap with which no more than the budget is taken
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(length, middle) for length in lengths) <= budget else (low, middle - 1)
    taken = [min(length, low) for length in lengths]
    left = budget - sum(taken)
    for place, length in enumerate(lengths):
        if left and length > low:
            taken[place] += 1
            left -= 1
    return taken


def distinct(grams: Sequence[Sequence[Hashable]], budget: int) -> tuple[int, int] | None:
    """How many of `budget` n-grams differ, taken evenly from the fronts of several answers; None where these hold fewer.

    The number falls with the amount of text (Heaps's law), so only equal budgets can be compared.
    """
    taken = first_of_each([len(of_answer) for of_answer in grams], budget)
    if taken is None:
        return None
    return len({gram for of_answer, number in zip(grams, taken, strict=True) for gram in of_answer[:number]}), budget


def distinct_over_set(grams: Sequence[Sequence[Sequence[Hashable]]], budget: int) -> tuple[np.ndarray, np.ndarray] | None:
    """distinct-n (Li et al. 2016) over all answers of all I prompts, as two columns [I] whose totals' ratio it is: distinct / budget.

    How many n-grams differ is no sum over prompts: one that two prompts share is lost only if both go. So that the totals are exact and
    the delete-one jackknife is that of the whole statistic all the same, a prompt's part is the number of n-grams that it alone has (what
    is lost without it) and an equal share of those that several have (a constant, which the jackknife's centring takes out again). With
    equally many n-grams from each prompt the influences are those of deleting the prompt and counting again; the jackknife errs on
    the side of caution there (Efron and Stein 1981). The bootstrap over such columns draws influences and not texts: drawing texts
    again would count the same text twice and find too few distinct n-grams.

    `grams` are by prompt, by answer, in order; `budget` is spent as evenly over all answers as their lengths allow. None where all
    answers together hold fewer n-grams.
    """
    taken = first_of_each([len(of_answer) for of_prompt in grams for of_answer in of_prompt], budget)
    if taken is None:
        return None
    numbers = iter(taken)
    kept = [[gram for of_answer in of_prompt for gram in of_answer[: next(numbers)]] for of_prompt in grams]
    prompts_with = Counter(gram for of_prompt in kept for gram in set(of_prompt))
    alone = np.array([sum(prompts_with[gram] == 1 for gram in set(of_prompt)) for of_prompt in kept], dtype=np.float64)
    shared = len(prompts_with) - alone.sum()
    return alone + shared / len(grams), np.array([len(of_prompt) for of_prompt in kept], dtype=np.float64)


class SelfBleu:
    """Each answer's BLEU against the other answers to its prompt (Zhu et al. 2018), from 0 to 100: 100 where all say the same.

    By sacrebleu's sentence BLEU: its tokenisation 13a, exponential smoothing, orders that an answer is too short for left out. Raises
    ConfigError naming `key` where sacrebleu is not installed.
    """

    def __init__(self, key: str):
        try:
            from sacrebleu.metrics.bleu import BLEU
        except ImportError:
            raise ConfigError(f"{key}: needs sacrebleu, which is not installed: pip install 'potstill[eval]'") from None
        self._bleu = BLEU(tokenize="13a", smooth_method="exp", effective_order=True)

    @property
    def stated(self) -> str:
        """What decides the number, in words."""
        import sacrebleu

        return f"sentence BLEU of sacrebleu {sacrebleu.__version__}, tokenize 13a, smooth exp, effective order"

    def scores(self, answers: Sequence[str]) -> list[float]:
        """One score an answer, of at least two answers."""
        return [
            self._bleu.sentence_score(answer, [*answers[:place], *answers[place + 1 :]]).score for place, answer in enumerate(answers)
        ]
