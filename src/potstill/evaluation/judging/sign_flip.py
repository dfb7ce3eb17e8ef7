"""The test of two contestants on the same prompts: were their names exchanged at random, prompt by prompt, how often would the difference
be as large? Knows numbers alone.
"""

import numpy as np

_SCALES = (1, 2, 4, 20, 100)
_MOST_CELLS = 4_000_000
_DRAWS = 20_000
_AT_ONCE = 4_000_000


def sign_flip_p_value(differences: np.ndarray, *, seed: int = 0) -> tuple[float, bool]:
    """Two-sided p-value of the sum of `differences` [I] under random signs, and whether it is exact.

    Exact where the differences are multiples of 1/100 and not too many: the distribution of the sum is then convolved. With differences
    of one size it is the sign test (McNemar's). Otherwise 20,000 draws, the observed one counted among them, so that it is never 0.
    """
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[np.abs(differences) > 1e-12]
    if differences.size == 0:
        return 1.0, True
    for scale in _SCALES:
        steps = np.abs(differences * scale)
        whole = np.rint(steps)
        if np.abs(steps - whole).max() < 1e-6 and whole.sum() * differences.size <= _MOST_CELLS:
            return _exact(whole.astype(np.int64), int(np.rint(abs(differences.sum() * scale)))), True
    return _drawn(differences, seed), False


def _exact(steps: np.ndarray, observed: int) -> float:
    """The share of sign choices whose sum is at least `observed` away from 0; `steps` [I] are whole numbers above 0."""
    reach = int(steps.sum())
    mass = np.zeros(2 * reach + 1)
    mass[reach] = 1.0
    for step in steps:
        mass = (np.roll(mass, step) + np.roll(mass, -step)) / 2  # nothing wraps: the ends are reached by the last step
    sums = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, mass[sums >= observed].sum()))


def _drawn(differences: np.ndarray, seed: int) -> float:
    generator = np.random.default_rng(seed)
    observed = abs(differences.sum()) * (1 - 1e-12)
    extreme = 0
    for part in np.array_split(np.arange(_DRAWS), max(1, _DRAWS * differences.size // _AT_ONCE)):
        signs = generator.integers(0, 2, (part.size, differences.size)) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (_DRAWS + 1)
