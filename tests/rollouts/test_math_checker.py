"""The checker `math` on real reference answers in several wordings, and on text that is written to break it."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from potstill.errors import ConfigError
from potstill.rollouts import math_checker
from potstill.rollouts.checkers import final_part, make_checker

KEY = "generate.filters.checker"
MATH500 = Path(__file__).resolve().parents[3] / "shared" / "data" / "reasoning" / "math500.jsonl.gz"
WORDINGS = ("It comes to ${}$", "So \\({}\\) it is", "Therefore $\\boxed{{{}}}$.", "The answer is ${}$.", "Answer: {}", "{}")


@pytest.fixture(scope="module")
def check():
    checker = make_checker("math", KEY)
    yield lambda answer, reference: checker(answer, reference, {})
    math_checker._WORKER.stop()


@pytest.fixture(scope="module")
def references():
    if not MATH500.exists():
        pytest.skip("the MATH-500 rows are not here")
    with gzip.open(MATH500, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][::5]


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_reference_is_itself_in_every_wording(check, references, wording):
    assert [row["answer"] for row in references if not check(wording.format(row["answer"]), row["answer"])] == []


def test_a_written_solution_comes_to_its_answer_and_not_to_anothers(check, references):
    assert all(check(row["solution"], row["answer"]) for row in references)
    others = [(row["solution"], other["answer"]) for row, other in zip(references, references[7:], strict=False)]
    accepted = [(solution, answer) for solution, answer in others if check(solution, answer)]
    assert all(final_part(solution) == answer for solution, answer in accepted)
    assert len(accepted) < 5


def test_other_forms_of_a_number_are_the_number(check, references):
    whole = [row["answer"] for row in references if re.fullmatch(r"\d+", row["answer"])]
    assert len(whole) > 20
    assert all(check(f"${answer}.0$", answer) and check(f"\\frac{{{2 * int(answer)}}}{{2}}", answer) for answer in whole)
    assert not any(check(f"${int(answer) + 1}$", answer) for answer in whole)


HOSTILE = [
    "9**9**9**9", "(" * 3000, "__import__('os').abort()", "\x00\ud800\u202e", "a" * 10**6, "1" * 5000, "1e999999999", "$$", "}{", "\n\n",
    "\\boxed{" + "{" * 1000, "\\begin{pmatrix}" * 500, '["], ["', "[\"42\", \"42\"]\n[\"42\", \"42\"]",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_breaks_it_or_is_right(check, text):
    assert check(text, "42") is False
    assert check("42", text) is False
    assert check("$42.0$", "42") is True


def test_what_takes_too_long_is_wrong_and_the_next_answer_is_judged_all_the_same(check, monkeypatch):
    assert check("$42.0$", "42")
    process = math_checker._WORKER._process
    monkeypatch.setattr(math_checker, "_SECONDS", 0.5)
    began = time.monotonic()
    assert check("$(10^9)!$", "42") is False
    assert time.monotonic() - began < 5
    assert process is not None
    assert process.poll() is not None, "the process that was busy goes on"
    monkeypatch.undo()
    assert check("$42.0$", "42") is True


def test_a_process_that_was_killed_is_replaced(check):
    assert check("$42.0$", "42")
    assert math_checker._WORKER._process is not None
    math_checker._WORKER._process.kill()
    math_checker._WORKER._process.wait()
    assert check("$42.0$", "42")


def test_it_answers_in_a_thread_too(check):
    found = []
    thread = threading.Thread(target=lambda: found.append(check("$42.0$", "42")))
    thread.start()
    thread.join()
    assert found == [True]


def test_the_process_knows_no_secret_and_no_folder_of_the_user(check, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "do-not-tell")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math_verify.py").write_text("raise SystemExit('the folder was imported from')")
    math_checker._WORKER.stop()
    assert check("$42.0$", "42")
    process = math_checker._WORKER._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ")
    if environment.exists():
        assert b"do-not-tell" not in environment.read_bytes()


def test_no_process_is_left_when_the_program_ends():
    script = (
        "from potstill.rollouts.checkers import make_checker; from potstill.rollouts import math_checker\n"
        "assert make_checker('math', 'k')('$42.0$', '42', {})\n"
        "print(math_checker._WORKER._process.pid)"
    )
    finished = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert finished.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(finished.stdout), 0)


def test_without_math_verify_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(math_checker, "find_spec", lambda name: None if name == "math_verify" else find_spec(name))
    with pytest.raises(ConfigError, match=r"generate\.filters\.checker: math needs math-verify.*potstill\[eval\]"):
        make_checker("math", KEY)
