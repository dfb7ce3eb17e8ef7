"""A function that a recipe names: found or refused with the way out, called with texts, and believed where it gives a number."""

import math
import sys

import numpy as np
import pytest
import torch

from potstill.errors import ConfigError
from potstill.rollouts.config import RewardConfig
from potstill.rollouts.named_function import load_function
from potstill.rollouts.prompts import Prompts
from potstill.rollouts.reward import Reward, load_reward
from potstill.rollouts.writing import Completion
from tiny import tiny_tokenizer

SOURCE = '''
"""Rewards of a test."""
from dataclasses import dataclass

LIMIT = 3
loads = []
loads.append(1)


@dataclass
class Kept:
    value: float = 1.0


def right(prompt, answer, reference, row):
    return 1.0 if answer.strip() == reference.strip() else Kept(0.0).value


def by_name(prompt, answer, reference, row, *, scale=2.0):
    return scale * len(row)


def two(prompt, answer):
    return 1.0


async def later(prompt, answer, reference, row):
    return 1.0


def fails(prompt, answer, reference, row):
    return 1 / 0
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "rewards.py"


def _load(spec):
    return load_reward(RewardConfig(function=spec))


# ---------------------------------------------------------------- found, or refused


def test_a_function_of_a_file_is_found_by_its_path(file):
    for spec in ("rewards.py:right", "./rewards.py:right", f"{file}:right"):
        found = _load(spec)
        assert (found.spec, found("p", "a ", "a", {})) == (spec, 1.0)
    assert not list(file.parent.rglob("__pycache__"))


def test_a_function_of_an_installed_module_is_found():
    assert load_function("math:hypot", key="k", arguments=("a", "b"))(3, 4) == 5
    assert load_function("os.path:join", key="k", arguments=("a", "b"))("a", "b") == "a/b"


def test_two_files_of_one_name_are_two(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "r.py").write_text(f"def f(prompt, answer, reference, row): return {number}\n")
    one, two = (_load(f"{tmp_path}/{number}/r.py:f") for number in (1, 2))
    assert (one("", "", "", {}), two("", "", "", {})) == (1, 2)
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == _load(f"{tmp_path}/1/r.py:f").fingerprint


def test_a_changed_file_has_another_fingerprint(file):
    before = _load("rewards.py:right").fingerprint
    file.write_text(SOURCE.replace("1.0 if", "2.0 if"))
    after = _load("rewards.py:right")
    assert after.fingerprint != before
    assert after("", "x", "x", {}) == 2.0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("absent.py:right", "no such file"),
        ("rewards.py:wrong", "there is no wrong in it; its functions are by_name, fails, later, right, two"),
        ("rewards.py:LIMIT", "is 3, which is no function"),
        ("rewards.py:two", r"cannot be called with \(prompt, answer, reference, row\): too many positional arguments"),
        ("rewards.py:later", "async function"),
        ("rewards:right", r"no module rewards is installed; a file of yours is named by its path, rewards.py:NAME"),
        ("no.such.module:right", "no module no.such.module is installed"),
        ("broken.py:f", "fails as it loads: SyntaxError"),
        ("raises.py:f", "fails as it loads: RuntimeError: not today"),
        ("leaves.py:f", "fails as it loads: SystemExit"),
        ("needs.py:f", "fails as it loads: ModuleNotFoundError: No module named 'absent_package'"),
        (".:f", "write FILE.py:NAME or MODULE:NAME"), ("a b:f", "write FILE.py:NAME or MODULE:NAME"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_reward_is_refused_with_its_key(spec, words, file):
    (file.parent / "broken.py").write_text("def f(:\n")
    (file.parent / "raises.py").write_text("raise RuntimeError('not today')\n")
    (file.parent / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (file.parent / "needs.py").write_text("import absent_package\n")
    known = set(sys.modules)
    with pytest.raises(ConfigError, match=f"rollouts.reward.function.*{words}") as caught:
        _load(spec)
    assert spec in str(caught.value)
    left = {name for name in set(sys.modules) - known if name.startswith("potstill_named")}
    assert bool(left) == (spec.startswith("rewards.py")), "a file that failed as it loaded is a module all the same"


@pytest.mark.parametrize("spec", ["rewards.py", ":f", "rewards.py:", "rewards.py:a.b", "rewards.py:1st"])
def test_a_name_that_is_none_is_refused_by_the_recipe(spec):
    with pytest.raises(ValueError, match=f"function: '{spec}' names no function; write FILE.py:NAME or MODULE:NAME"):
        RewardConfig(function=spec)


# ---------------------------------------------------------------- called, and believed or not


TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id


def _ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def _decode(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def _prompts():
    from potstill.batch import Example

    prompt, answer = _ids("Add 12 and 30: "), [*_ids("42"), END]
    return Prompts(
        [Example(prompt + answer, [False] * len(prompt) + [True] * len(answer), 0, "rows.jsonl:7")], max_tokens=64, max_new_tokens=8
    )


def _completion(text, *, ended=True):
    tokens = (*_ids(text), END) if ended else tuple(_ids(text))
    return Completion(tokens, (-1.0,) * len(tokens), ended)


def _reward(function, columns=None):
    from potstill.rollouts.named_function import NamedFunction

    return Reward(NamedFunction("r.py:f", function, ""), _prompts().__getitem__, _decode, columns)


def test_it_is_called_with_texts_and_the_row():
    seen = []
    reward = _reward(lambda *arguments: seen.append(arguments) or 0.5, lambda row: {"id": row, "level": "easy"})
    assert reward(0, _completion("41")) == 0.5
    assert seen == [("Add 12 and 30: ", "41", "42", {"id": 0, "level": "easy"})]


def test_without_columns_the_row_is_empty_and_no_caller_changes_it():
    rows = {"id": 1}
    assert _reward(lambda p, a, r, row: len(row))(0, _completion("4")) == 0.0
    _reward(lambda p, a, r, row: row.update(id=9) or 1.0, lambda row: rows)(0, _completion("4"))
    assert rows == {"id": 1}


@pytest.mark.parametrize(("ended", "text"), [(True, "42"), (False, "42")])
def test_what_ends_an_answer_is_no_part_of_its_text(ended, text):
    seen = []
    _reward(lambda p, a, r, row: seen.append(a) or 0)(0, _completion(text, ended=ended))
    assert seen == ["42"]
    newline = TOKENIZER("\n", add_special_tokens=False)["input_ids"][-1]
    _reward(lambda p, a, r, row: seen.append(a) or 0)(0, Completion((*_ids("42"), newline), (-1.0,) * 9, True))
    assert seen == ["42", "42"]


@pytest.mark.parametrize("given", [1, True, 0.25, -3, np.float32(0.25), np.int64(4), np.array(2.0), torch.tensor(0.5), np.bool_(True)])
def test_numbers_are_believed(given):
    assert _reward(lambda *_: given)(0, _completion("4")) == float(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "gave None, a NoneType"), ("1.0", "gave '1.0', a str"), ([1.0], "a list"), (math.nan, "gave nan, which is not finite"),
        (math.inf, "not finite"), (torch.tensor([1.0, 2.0]), "not one number"), (10**400, "not one number"), (1j, "a complex"),
        (torch.tensor(float("nan")), "not finite"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_key_function_and_row(given, words):
    with pytest.raises(ConfigError, match=rf"rollouts.reward.function: r.py:f of the answer to rows.jsonl:7 .*{words}"):
        _reward(lambda *_: given)(0, _completion("4"))


def test_its_own_failure_is_told_with_the_row():
    with pytest.raises(ConfigError, match=r"answer to rows\.jsonl:7 failed: ZeroDivisionError: division by zero") as caught:
        _reward(lambda *_: 1 / 0)(0, _completion("4"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_writer_gives_each_answer_its_reward_less_the_mean_of_the_others():
    from potstill.rollouts.endings import Endings
    from potstill.rollouts.writer import Writer
    from potstill.rollouts.writing import Sampling
    from seeded_generator import END as SEEDED_END
    from seeded_generator import SeededGenerator
    from small_runs import examples

    prompts = Prompts(examples(9, seed=1), max_tokens=64, max_new_tokens=8)
    given = {}

    def reward(row, completion):
        given[row] = float(len(completion.tokens)) + 0.1 * row
        return given[row]

    writer = Writer(prompts, SeededGenerator(), Sampling(max_new_tokens=8), Endings([SEEDED_END]), seed=3, by="student", reward=reward)
    written = writer.write([4, 2, 8, 1], 0)
    for example in written:
        others = [value for row, value in given.items() if row != example.index]
        assert example.reward == pytest.approx(given[example.index] - sum(others) / 3, abs=1e-12)
    assert sum(example.reward for example in written) == pytest.approx(0.0, abs=1e-12)
