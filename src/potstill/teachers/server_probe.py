"""A fixed text that a server scores again and again, so that another model behind the same address is noticed. Knows no HTTP.

It also shows what the server calls its ids, which is compared with the student's tokenizer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from potstill.errors import IncompatibleError
from potstill.teachers.server_answers import Scored

_TEXT = "In 1999, 3 quick foxes\n\tcounted 12,345 grapes: don't ask why! def f(x): return x ** 2 # naïve, 中文, Привет"
_MOST_TOKENS = 32
_UNDECODED = "\ufffd"


def probe_tokens(tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int, max_model_len: int | None) -> list[int]:
    """The ids of a fixed text, or scattered ids where there is no tokenizer; one less than the server takes, and at least two."""
    most = max(2, min(_MOST_TOKENS, (max_model_len or _MOST_TOKENS + 1) - 1))
    ids: list[int] = []
    if tokenizer is not None:
        ids = [number for number in tokenizer(_TEXT, add_special_tokens=False)["input_ids"] if number < vocabulary_size]
    if len(ids) < 2:
        ids = [(7919 * place + 11) % vocabulary_size for place in range(most)]
    return ids[:most]


@dataclass(frozen=True)
class Fingerprint:
    """What a server says of the probe: log-probabilities of its tokens, and the texts of the ids that it named."""

    values: tuple[float, ...]
    texts: Mapping[int, str]

    @classmethod
    def of(cls, scored: Scored) -> "Fingerprint":
        return cls(tuple(float(value) for value in scored.actual), scored.texts)

    def as_text(self) -> str:
        """A JSON list, for provenances and fingerprints; `probe_difference` reads it."""
        return json.dumps([round(value, 4) for value in self.values])


def digest(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Names the probe: another probe's values are not to be compared with these."""
    spelled = tokenizer.convert_ids_to_tokens(list(tokens)) if tokenizer is not None else None
    return xxhash.xxh3_64_hexdigest(json.dumps([list(tokens), spelled]).encode())


def probe_difference(before: str, now: str, tolerance: float) -> str | None:
    """How two probes (JSON lists, as `identity["probe"]` holds them) differ by more than `tolerance` nats, in words; None if not.

    This is what a resumed run or capture compares with: the values of one model differ in their last digits from one day to the next.
    """
    old, new = (np.asarray(json.loads(text), np.float64) for text in (before, now))
    if old.shape != new.shape:
        return f"the probe had {old.size} values and has {new.size}"
    drift = np.abs(old - new)
    if not drift.size or drift.max() <= tolerance:
        return None
    place = int(drift.argmax())
    return f"token {place + 1} of the probe had log-probability {old[place]:.4f} and has {new[place]:.4f} ({drift[place]:.4f} nats apart)"


def refuse_other_texts(texts: Mapping[int, str], tokenizer: PreTrainedTokenizerBase, server: str) -> None:
    """Raises IncompatibleError, naming the first id that the server spells as another token than the student's tokenizer does.

    Blanks at the ends are not compared, and neither are ids that are parts of a character: servers write them as they like.
    """
    for number in sorted(texts):
        theirs = texts[number].strip()
        ours = tokenizer.decode([number]) if number < len(tokenizer) else ""
        if not isinstance(ours, str) or not theirs or not ours.strip() or _UNDECODED in theirs + ours:
            continue
        if ours.strip() != theirs:
            raise IncompatibleError(
                f"the student and {server} do not read the same tokens: id {number} is {ours!r} to the student and "
                f"{texts[number][:50]!r} to the server. Choose a served model with the student's tokenizer"
            )
