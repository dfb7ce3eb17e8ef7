"""A seeded family of small instruction tasks with written steps, and the program that checks their answers.

Several kinds have more than one right answer ("name a thing that costs more than 3"), as most instructions do; the checker
accepts every right one. Which split a problem belongs to is decided by its content alone, so that no seed, order or number of
rows can carry a test problem into a training set. It knows nothing of tokenizers or models.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "transfer", "validation", "test"]
Row = dict[str, str]

ANSWER = "Answer:"
WORDS = [
    "ant", "bell", "boat", "book", "cake", "coat", "corn", "crab", "desk", "drum", "fish", "flag",
    "fork", "goat", "hand", "horn", "kite", "lamp", "leaf", "milk", "nest", "ring", "ship", "star",
]  # fmt: skip
LETTERS = "abcdefgh"

# Shares of all problems, in hundredths.
SHARES: dict[Split, int] = {"train": 70, "transfer": 10, "validation": 10, "test": 10}


@dataclass(frozen=True)
class Kind:
    """One kind of task. Everything that makes a problem another problem stands in its `input`; phrasings only vary the words.

    `draw` writes an input; `answers` lists every right answer to it, from the input alone; `steps` writes the way to one of
    them.
    """

    name: str
    phrasings: tuple[str, ...]
    draw: Callable[[random.Random], str]
    answers: Callable[[str], list[str]]
    steps: Callable[[str, str], str]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _draw_sum(rng: random.Random) -> str:
    return f"{rng.randrange(10, 100)} + {rng.randrange(10, 100)}"


def _sum(text: str) -> list[str]:
    return [str(sum(int(number) for number in text.split(" + ")))]


def _sum_steps(text: str, answer: str) -> str:
    left, right = (int(number) for number in text.split(" + "))
    units = left % 10 + right % 10
    carry = " + 1" if units > 9 else ""
    tens = left // 10 + right // 10 + units // 10
    return f"{left % 10} + {right % 10} = {units}, {left // 10} + {right // 10}{carry} = {tens}."


# --- a small table given in the prompt --------------------------------------------------------------------------------


def _table(text: str) -> tuple[dict[str, int], str]:
    """"table: cup 4, hat 9; hat" as its entries and the question that follows them."""
    table, question = text.removeprefix("table: ").split("; ")
    return {name: int(value) for name, value in (entry.split() for entry in table.split(", "))}, question


def _draw_table(rng: random.Random) -> dict[str, int]:
    return dict(zip(rng.sample(WORDS, 4), rng.sample(range(1, 10), 4), strict=True))


def _write_table(table: dict[str, int], question: object) -> str:
    return f"table: {', '.join(f'{word} {value}' for word, value in table.items())}; {question}"


def _draw_look_up(rng: random.Random) -> str:
    table = _draw_table(rng)
    return _write_table(table, rng.choice(list(table)))


def _look_up(text: str) -> list[str]:
    table, wanted = _table(text)
    return [str(table[wanted])]


def _look_up_steps(text: str, answer: str) -> str:
    return f"The row is {_table(text)[1]} {answer}."


def _draw_above(rng: random.Random) -> str:
    table = _draw_table(rng)
    return _write_table(table, rng.randrange(1, max(table.values())))


def _above(text: str) -> list[str]:
    table, bound = _table(text)
    return [word for word, value in table.items() if value > int(bound)]


def _above_steps(text: str, answer: str) -> str:
    table, bound = _table(text)
    return f"The {answer} costs {table[answer]}, more than {bound}."


# --- lists ------------------------------------------------------------------------------------------------------------


def _list(text: str) -> list[str]:
    return text.removeprefix("list: ").split("; ")[0].split()


def _draw_reverse(rng: random.Random) -> str:
    return f"list: {' '.join(rng.sample(WORDS, 4))}"


def _reverse(text: str) -> list[str]:
    return [" ".join(_list(text)[::-1])]


def _reverse_steps(text: str, answer: str) -> str:
    return f"From the end: {answer.replace(' ', ', ')}."


def _draw_next(rng: random.Random) -> str:
    words = rng.sample(WORDS, 5)
    return f"list: {' '.join(words)}; {rng.choice(words[:-1])}"


def _next(text: str) -> list[str]:
    words = _list(text)
    return [words[words.index(text.split("; ")[1]) + 1]]


def _next_steps(text: str, answer: str) -> str:
    return f"The list goes {text.split('; ')[1]} {answer}."


def _draw_size(rng: random.Random) -> str:
    return f"list: {' '.join(rng.sample(WORDS, rng.randrange(2, 8)))}"


def _size(text: str) -> list[str]:
    return [str(len(_list(text)))]


def _size_steps(text: str, answer: str) -> str:
    return f"Counted: {', '.join(f'{word} {number}' for number, word in enumerate(_list(text), 1))}."


def _draw_even(rng: random.Random) -> str:
    while True:
        digits = [rng.randrange(1, 10) for _ in range(5)]
        if any(digit % 2 == 0 for digit in digits):
            return f"list: {' '.join(map(str, digits))}"


def _even(text: str) -> list[str]:
    return [digit for digit in _list(text) if int(digit) % 2 == 0]


def _even_steps(text: str, answer: str) -> str:
    return f"Even: {' '.join(_even(text))}."


# --- strings ----------------------------------------------------------------------------------------------------------


def _draw_replace(rng: random.Random) -> str:
    letters = rng.choices(LETTERS, k=6)
    return f"text: {' '.join(letters)}; {rng.choice(letters)} to {rng.choice('xyz')}"


def _replace(text: str) -> list[str]:
    letters, change = text.removeprefix("text: ").split("; ")
    old, new = change.split(" to ")
    return [letters.replace(old, new)]


def _replace_steps(text: str, answer: str) -> str:
    old, new = text.split("; ")[1].split(" to ")
    return f"Each {old} becomes {new}."


def _draw_common(rng: random.Random) -> str:
    while True:
        left, right = rng.sample(LETTERS, 4), rng.sample(LETTERS, 4)
        if set(left) & set(right):
            return f"texts: {' '.join(left)}; {' '.join(right)}"


def _common(text: str) -> list[str]:
    left, right = text.removeprefix("texts: ").split("; ")
    return [letter for letter in left.split() if letter in right.split()]


def _common_steps(text: str, answer: str) -> str:
    return f"The letter {answer} is in both."


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("sum", ("Add the numbers.", "What is the sum?", "Work this out."), _draw_sum, _sum, _sum_steps),
        Kind("look_up", ("What does it cost?", "Look up the price.", "Find the price in the table."),
             _draw_look_up, _look_up, _look_up_steps),
        Kind("above", ("Name a thing that costs more.", "Which thing is above the limit? Name one.", "Pick one that costs more."),
             _draw_above, _above, _above_steps),
        Kind("reverse", ("Reverse the list.", "Write the words backwards.", "Turn the order round."),
             _draw_reverse, _reverse, _reverse_steps),
        Kind("next", ("Which word comes next?", "Name the word that follows.", "What stands after the word?"),
             _draw_next, _next, _next_steps),
        Kind("size", ("Count the words.", "How many words are there?", "How long is the list?"), _draw_size, _size, _size_steps),
        Kind("even", ("Name an even number.", "Pick a number that is even.", "Which number is even? Name one."),
             _draw_even, _even, _even_steps),
        Kind("replace", ("Replace the letter.", "Change one letter into another.", "Swap the letter for the new one."),
             _draw_replace, _replace, _replace_steps),
        Kind("common", ("Name a letter that is in both.", "Which letter do they share? Name one.", "Find one common letter."),
             _draw_common, _common, _common_steps),
    )
}  # fmt: skip


def split_of(kind: str, text: str) -> Split:
    """The split that a problem belongs to, from a hash of its kind and the words of its input in any order.

    Order is left out so that "17 + 25" and "25 + 17" never stand on two sides.
    """
    content = f"{kind}|{' '.join(sorted(re.findall(r'[a-z0-9]+', text)))}"
    place = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") % sum(SHARES.values())
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares cover every place")


def make(split: Split, num: int, seed: int) -> list[Row]:
    """`num` rows of `split`, the kinds in equal parts, no problem twice; the same for the same arguments.

    A row has `instruction`, `input`, `output` (the steps, then "Answer: ..."), `kind`, and `answer` (the one that is written,
    a random one where several are right).
    """
    if split not in SHARES:
        raise ValueError(f"no split {split!r}: there are {', '.join(SHARES)}")
    rng = random.Random(f"{split} {seed}")
    kinds = list(KINDS.values())
    seen: set[tuple[str, str]] = set()
    rows = []
    for number in range(num):
        kind = kinds[number % len(kinds)]
        text = _new_input(kind, split, seen, rng)
        answer = rng.choice(kind.answers(text))
        output = f"{kind.steps(text, answer)} {ANSWER} {answer}"
        rows.append({"instruction": rng.choice(kind.phrasings), "input": text, "output": output, "kind": kind.name, "answer": answer})
    rng.shuffle(rows)
    return rows


def _new_input(kind: Kind, split: Split, seen: set[tuple[str, str]], rng: random.Random) -> str:
    for _ in range(100_000):
        text = kind.draw(rng)
        if (kind.name, text) not in seen and split_of(kind.name, text) == split:
            seen.add((kind.name, text))
            return text
    raise ValueError(f"the kind {kind.name!r} has no further problem in the split {split!r}: ask for fewer rows")


def extract_answer(text: str) -> str | None:
    """What follows the last "Answer:" on its line; None where no answer is given."""
    _, found, rest = text.rpartition(ANSWER)
    lines = rest.strip().splitlines() if found else []
    return lines[0].strip().removesuffix(".") if lines else None


def check(row: Row, text: str) -> bool:
    """Whether `text` ends in a right answer to the row's problem; the steps are not judged."""
    return extract_answer(text) in KINDS[row["kind"]].answers(row["input"])
