"""What a task gives for an answer: a function of the user's, called with texts. It knows no model, no loss and no baseline."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from potstill.errors import ConfigError
from potstill.rollouts.config import RewardConfig
from potstill.rollouts.named_function import NamedFunction, load_function
from potstill.rollouts.writing import Completion

KEY = "rollouts.reward.function"
# What was committed before is kept; a function that was changed is another one, and a resume asks whether that is meant.
_REMEDY = f"; mend it and go on with --override-resume {KEY}"
ARGUMENTS = ("prompt", "answer", "reference", "row")


class Asked(Protocol):
    """A row's tokens: what is asked, and how the data set answers it."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def reference(self) -> Sequence[int]: ...

    @property
    def origin(self) -> str: ...


def load_reward(config: RewardConfig) -> NamedFunction:
    """Before any model is loaded. Raises ConfigError naming the key."""
    return load_function(config.function, key=KEY, arguments=ARGUMENTS)


class Reward:
    """`reward(row, completion)` is the number that the function gives. What ends an answer is no part of its text."""

    def __init__(
        self, function: NamedFunction, asked: Callable[[int], Asked], decode: Callable[[Sequence[int]], str],
        columns: Callable[[int], Mapping[str, Any]] | None = None,
    ):  # fmt: skip
        """`asked(row)` and `columns(row)` give a row's tokens and, where they are known, the columns that it has in its file."""
        self._function, self._asked, self._decode, self._columns = function, asked, decode, columns

    def __call__(self, row: int, completion: Completion) -> float:
        """Raises ConfigError where the function fails, or gives anything but a finite number."""
        asked = self._asked(row)
        answer = completion.tokens[:-1] if completion.ended else completion.tokens
        texts = [self._decode(list(tokens)) for tokens in (asked.tokens, answer, asked.reference)]
        columns = dict(self._columns(row)) if self._columns is not None else {}
        where = f"{KEY}: {self._function.spec} of the answer to {asked.origin or f'row {row}'}"
        try:
            given = self._function(*texts, columns)
        except Exception as error:
            raise ConfigError(f"{where} failed: {type(error).__name__}: {error}{_REMEDY}") from error
        return _number(given, where)


def _number(given: Any, where: str) -> float:
    if isinstance(given, str | bytes) or not hasattr(given, "__float__"):
        raise ConfigError(f"{where} gave {given!r:.80}, a {type(given).__name__}; a number is needed{_REMEDY}")
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(f"{where} gave {given!r:.80}, which is not one number ({error}){_REMEDY}") from error
    if not math.isfinite(number):
        raise ConfigError(f"{where} gave {number}, which is not finite{_REMEDY}")
    return number
