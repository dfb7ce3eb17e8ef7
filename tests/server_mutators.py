"""Ways in which an answer of vLLM's completions goes wrong: each takes the JSON (or the bytes) and a generator, and spoils it.

The JSON is changed in place, unless something else is returned. Every one changes something that a careful reader can see; `naive_read`
is the reader that is not careful.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np

Answer = Any
MUTATORS: dict[str, Callable[[Answer, random.Random], Answer]] = {}
BYTE_MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {}


def mutator(change: Callable[[Answer, random.Random], Answer | None]):
    def changed(answer: Answer, numbers: random.Random) -> Answer:
        result = change(answer, numbers)
        return answer if result is None else result

    MUTATORS[change.__name__] = changed
    return change


def byte_mutator(change: Callable[[bytes, random.Random], bytes]):
    BYTE_MUTATORS[change.__name__] = change
    return change


def _choice(answer: Answer, numbers: random.Random) -> dict[str, Any]:
    return numbers.choice(answer["choices"])


def _entry(answer: Answer, numbers: random.Random) -> dict[str, Any]:
    return numbers.choice(_choice(answer, numbers)["prompt_logprobs"][1:])


def _cell(answer: Answer, numbers: random.Random) -> dict[str, Any]:
    return numbers.choice(list(_entry(answer, numbers).values()))


def _rename(entry: dict[str, Any], old: str, new: str) -> None:
    cells = {new if key == old else key: cell for key, cell in entry.items()}
    entry.clear()
    entry.update(cells)


def _some_key(entry: dict[str, Any], numbers: random.Random) -> str:
    return numbers.choice(list(entry))


@mutator
def no_choices(answer, numbers):
    del answer["choices"]


@mutator
def a_choice_less(answer, numbers):
    answer["choices"].pop(numbers.randrange(len(answer["choices"])))


@mutator
def a_choice_twice(answer, numbers):
    answer["choices"].append(copy.deepcopy(_choice(answer, numbers)))


@mutator
def answers_exchanged(answer, numbers):
    first, second = answer["choices"][:2]
    first["prompt_logprobs"], second["prompt_logprobs"] = second["prompt_logprobs"], first["prompt_logprobs"]


@mutator
def indices_exchanged(answer, numbers):
    first, second = answer["choices"][:2]
    first["index"], second["index"] = second["index"], first["index"]


@mutator
def index_missing(answer, numbers):
    del _choice(answer, numbers)["index"]


@mutator
def no_log_probs(answer, numbers):
    _choice(answer, numbers)["prompt_logprobs"] = None


@mutator
def a_distribution_before_the_first_token(answer, numbers):
    entries = _choice(answer, numbers)["prompt_logprobs"]
    entries[0] = copy.deepcopy(entries[1])


@mutator
def an_entry_less(answer, numbers):
    entries = _choice(answer, numbers)["prompt_logprobs"]
    entries.pop(numbers.randrange(1, len(entries)))


@mutator
def an_entry_more(answer, numbers):
    entries = _choice(answer, numbers)["prompt_logprobs"]
    entries.append(copy.deepcopy(entries[-1]))


@mutator
def shifted_by_one(answer, numbers):
    """The commonest mistake of all: entry t taken for what follows token t."""
    entries = _choice(answer, numbers)["prompt_logprobs"]
    entries[1:] = [*entries[2:], entries[1]]


@mutator
def a_null_in_the_middle(answer, numbers):
    entries = _choice(answer, numbers)["prompt_logprobs"]
    entries[numbers.randrange(1, len(entries))] = None


@mutator
def an_empty_entry(answer, numbers):
    _entry(answer, numbers).clear()


@mutator
def an_entry_that_is_a_list(answer, numbers):
    entries = _choice(answer, numbers)["prompt_logprobs"]
    entries[numbers.randrange(1, len(entries))] = [1, 2, 3]


@mutator
def a_word_for_an_id(answer, numbers):
    entry = _entry(answer, numbers)
    _rename(entry, _some_key(entry, numbers), numbers.choice(["the", "", "1.5", "٣", "token_id:7"]))


@mutator
def a_negative_id(answer, numbers):
    entry = _entry(answer, numbers)
    _rename(entry, _some_key(entry, numbers), "-3")


@mutator
def an_id_beyond_the_vocabulary(answer, numbers):
    entry = _entry(answer, numbers)
    _rename(entry, _some_key(entry, numbers), str(numbers.choice([5000, 2**31, 2**70])))


@mutator
def an_id_with_a_leading_zero(answer, numbers):
    entry = _entry(answer, numbers)
    key = _some_key(entry, numbers)
    _rename(entry, key, "0" + key)


@mutator
def without_the_token_that_came(answer, numbers):
    """An entry of K + 1 ids loses the one that is asked about."""
    for choice in answer["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            del entry[max(entry, key=lambda key: entry[key]["rank"])]


@mutator
def an_outcome_less(answer, numbers):
    entry = _entry(answer, numbers)
    del entry[min(entry, key=lambda key: entry[key]["rank"])]


@mutator
def an_outcome_more(answer, numbers):
    entry = _entry(answer, numbers)
    free = next(str(number) for number in range(320) if str(number) not in entry)
    entry[free] = {"logprob": -30.0, "rank": 300, "decoded_token": None}
    second = next(str(number) for number in range(320) if str(number) not in entry)
    entry[second] = {"logprob": -31.0, "rank": 301, "decoded_token": None}


@mutator
def not_a_number(answer, numbers):
    _cell(answer, numbers)["logprob"] = float("nan")


@mutator
def infinite(answer, numbers):
    _cell(answer, numbers)["logprob"] = numbers.choice([float("inf"), float("-inf")])


@mutator
def a_probability_above_one(answer, numbers):
    entry = _entry(answer, numbers)
    entry[min(entry, key=lambda key: entry[key]["rank"])]["logprob"] = numbers.uniform(0.01, 5)


@mutator
def a_log_prob_of_another_type(answer, numbers):
    _cell(answer, numbers)["logprob"] = numbers.choice(["-1.5", None, True, [-1.0], {}])


@mutator
def no_log_prob(answer, numbers):
    del _cell(answer, numbers)["logprob"]


@mutator
def a_rank_of_another_type(answer, numbers):
    _cell(answer, numbers)["rank"] = numbers.choice([None, 1.0, "1", True])


@mutator
def a_rank_twice(answer, numbers):
    entry = _entry(answer, numbers)
    cells = sorted(entry.values(), key=lambda cell: cell["rank"])
    cells[0]["rank"] = cells[1]["rank"]


@mutator
def ranks_against_the_order(answer, numbers):
    entry = _entry(answer, numbers)
    cells = sorted(entry.values(), key=lambda cell: cell["rank"])
    cells[0]["rank"], cells[3]["rank"] = cells[3]["rank"], cells[0]["rank"]


@mutator
def mass_above_one(answer, numbers):
    for cell in _entry(answer, numbers).values():
        cell["logprob"] = -0.5 - cell["rank"] * 1e-3


@mutator
def mass_that_is_missing(answer, numbers):
    """As when a distribution is divided by a temperature, or log-probabilities are taken to another base."""
    for choice in answer["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            for cell in entry.values():
                cell["logprob"] -= 8


@mutator
def a_number_beyond_all_bounds(answer, numbers):
    _cell(answer, numbers)[numbers.choice(["logprob", "rank"])] = -(10**400)


@mutator
def the_token_that_came_is_too_likely(answer, numbers):
    """Of rank K + 1 or worse, and likelier than rank K."""
    for choice in answer["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            entry[max(entry, key=lambda key: entry[key]["rank"])]["logprob"] = -0.001


@mutator
def another_token_beyond_the_first_k(answer, numbers):
    """The token that came changes places with the likeliest one: K + 1 ids, and the last one is a stranger."""
    for choice in answer["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            ranked = sorted(entry, key=lambda key: entry[key]["rank"])
            entry[ranked[0]], entry[ranked[-1]] = entry[ranked[-1]], entry[ranked[0]]


@mutator
def tokens_miscounted(answer, numbers):
    answer["usage"]["prompt_tokens"] += numbers.choice([-1, 1, 100])


@mutator
def another_model(answer, numbers):
    answer["model"] = "tiny-2"


@mutator
def another_prompt_echoed(answer, numbers):
    _choice(answer, numbers)["prompt_token_ids"] = [1, 2, 3]


@mutator
def not_an_object(answer, numbers):
    return numbers.choice([False, [], "words", 5, [answer], {}])


@mutator
def an_error_with_status_200(answer, numbers):
    return {"error": {"message": "engine is dead", "code": 500}}


@byte_mutator
def cut_off(data, numbers):
    return data[: numbers.randrange(len(data))]


@byte_mutator
def a_page(data, numbers):
    return b"<html><body>502 Bad Gateway</body></html>"


@byte_mutator
def not_utf8(data, numbers):
    place = numbers.randrange(len(data))
    return data[:place] + b"\xff\xfe" + data[place:]


@byte_mutator
def an_id_that_stands_twice(data, numbers):
    """JSON allows a name twice, and a reader keeps the last."""
    answer = json.loads(data)
    entry = _entry(answer, numbers)
    keys = list(entry)
    old, new = keys[1], keys[2]
    return data.replace(json.dumps(entry).encode(), json.dumps(entry).replace(f'"{old}":', f'"{new}":').encode(), 1)


@byte_mutator
def too_deep(data, numbers):
    return b"[" * 100_000


@byte_mutator
def something_behind_it(data, numbers):
    return data + data


def naive_read(data: bytes, prompts: list[list[int]], k: int) -> np.ndarray:
    """What a client does that trusts: the K best log-probabilities of each entry."""
    rows = []
    for choice in json.loads(data)["choices"]:
        for entry in choice["prompt_logprobs"]:
            if entry:
                rows.append(sorted((cell["logprob"] for cell in entry.values()), reverse=True)[:k])
    return np.array(rows, np.float64)
