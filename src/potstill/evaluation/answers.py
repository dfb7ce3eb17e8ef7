"""What is read off several answers to one question: pass@k, majority votes, and how far they agree. Pure functions of few numbers."""

from collections.abc import Callable, Hashable, Sequence

from potstill.rollouts.checkers import chosen_letter, final_part, last_number, normalised

_COMES_TO: dict[str, Callable[[str], Hashable]] = {
    "numeric": lambda text: last_number(final_part(text)), "choice": lambda text: chosen_letter(final_part(text)),
}  # fmt: skip


def comes_to(text: str, checker: str = "exact") -> Hashable | None:
    """What an answer comes to, by which answers are the same: its last number or its letter for the checkers that look for these, else
    its final part with case and white space made alike. None for an answer that comes to nothing."""
    return _COMES_TO[checker](text) if checker in _COMES_TO else normalised(final_part(text)) or None


def pass_at(k: int, num_samples: int, num_right: int) -> float:
    """The chance that of k answers, drawn from n without putting back, one at least is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of Chen et al. (2021), as a product that stays within floats.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} answers")
    missed = 1.0
    for drawn in range(k):
        missed *= max(num_samples - num_right - drawn, 0) / (num_samples - drawn)
    return 1 - missed


def groups(keys: Sequence[Hashable | None]) -> list[list[int]]:
    """The places of equal keys together, largest group first; None is in no group."""
    found: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        if key is not None:
            found.setdefault(key, []).append(place)
    return sorted(found.values(), key=lambda places: -len(places))


def majority(keys: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """maj@n: how right the answer is that most of the n come to (Wang et al. 2023). Where several come to it equally often, their mean:
    what a fair draw among them would give. 0 where no answer comes to anything."""
    found = groups(keys)
    largest = [places for places in found if len(places) == len(found[0])]
    means = [sum(bool(right[place]) for place in places) / len(places) for places in largest]
    return sum(means) / len(means) if means else 0.0


def modal_share(keys: Sequence[Hashable | None]) -> float:
    """The share of the answers that come to the most frequent one; 0 where none comes to anything."""
    found = groups(keys)
    return len(found[0]) / len(keys) if found else 0.0


def agreeing_pairs(keys: Sequence[Hashable | None]) -> tuple[int, int]:
    """How many pairs of answers come to the same, and how many pairs there are. What comes to nothing agrees with nothing."""
    number = len(keys)
    return sum(len(places) * (len(places) - 1) // 2 for places in groups(keys)), number * (number - 1) // 2
