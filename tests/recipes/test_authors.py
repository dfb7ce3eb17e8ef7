"""Each author from the command line on a tiny pair: the right streams are learned, by the right objective, and the run resumes."""

import json
from pathlib import Path

import pytest

from potstill.run_folder import RunFolder
from small_recipe import LORA, potstill

SAMPLING = "sampling: {max_new_tokens: 8}"
SHORT = ("--quiet", "training.steps=2", "training.save_steps=1", "data.validation=null")
PROMPT = "data.teacher_prompt='{prompt} The answer is {answer}'"


def run(place: Path, name: str, rollouts: str, *overrides: str) -> list[dict]:
    """The lines of the log that speak of a step."""
    folder = place / name
    assert potstill("distill", place / "r.yaml", *SHORT, f"run.folder={folder}", f"rollouts={{{rollouts}, {SAMPLING}}}", *overrides) == 0
    return [line for line in RunFolder.read(folder).read_metrics() if "loss" in line]


def streams(lines: list[dict]) -> set[str]:
    return {key.partition("/")[2] for line in lines for key in line if key.startswith("loss/")} - {"ce", "kd"}


@pytest.mark.parametrize(
    ("name", "rollouts", "overrides", "learned"),
    [
        ("fresh", "author: student", (), {"student"}),
        ("taught", "author: teacher", ("objective={divergence: cross_entropy}",), {"teacher"}),
        ("teacher-mixed", "author: teacher_mixed", ("objective={divergence: reverse_kl, policy: {future: mean}}",), {"student"}),
        ("written", "author: student", ("objective={divergence: reverse_kl, support: written}",), {"student"}),
        ("top-k", "author: student", ("objective={divergence: reverse_kl, support: student_top_k_tail, top_k: 8}",), {"student"}),
        ("replay", "author: replay, replay: {start: 1.0, schedule: constant}", ("objective.divergence=skew_forward_kl",), {"student"}),
        (
            "pair",
            "author: pair, others: teacher",
            ("objective={divergence: skew_forward_kl, kd_ratio: 1.0, on_student_text: {divergence: skew_reverse_kl}}",),
            {"student", "teacher"},
        ),
        ("self-base", "author: student", ("teacher={kind: self}", LORA, PROMPT), {"student"}),
        ("self-average", "author: student", ("teacher={kind: self, weights: average}", PROMPT), {"student"}),
    ],
)
def test_an_author_writes_and_its_text_is_learned(place, name, rollouts, overrides, learned):
    lines = run(place, name, rollouts, *overrides)
    assert len(lines) == 2
    assert streams(lines) == learned
    assert all(line["loss"] > 0 and line["loss/kd"] >= 0 for line in lines)
    if "student" in learned:
        assert 1 <= lines[-1]["rollouts/length"] <= 8
        texts = [json.loads(line) for line in (place / name / "rollouts.jsonl").read_text().splitlines()]
        assert any("Add" in text["prompt"] for text in texts)
    assert RunFolder.read(place / name).read_recipe()["data"]["packing"] is False


def test_a_mixture_goes_by_steps_and_plain_text_stands_beside(place):
    (place / "text.txt").write_text("".join(f"Plain text number {number} about foxes and dogs.\n" for number in range(12)))
    given = f"author: mixture, student: 0.5, text: {{path: {place}/text.txt, max_tokens: 24}}"
    lines = run(place, "mixture", given, "training.steps=6", "objective.on_student_text={divergence: reverse_kl}")
    assert streams(lines) == {"student", "dataset", "text"}
    assert all("loss/text" in line for line in lines)
    # The student's own text is never learned by cross-entropy: beside the text's nothing of it is in the loss.
    for line in lines:
        if "loss/student" in line:
            assert line["loss"] == pytest.approx(line["loss/student"] + line["loss/text"], rel=1e-4)


def test_plain_text_beside_the_data_set_has_a_loss_of_its_own_in_the_log(place):
    (place / "beside.txt").write_text("".join(f"Plain text number {number} about foxes and dogs.\n" for number in range(12)))
    given = f"rollouts={{author: dataset, text: {{path: {place}/beside.txt, max_tokens: 24, weight: 0.5}}}}"
    folder = place / "beside"
    assert potstill("distill", place / "r.yaml", *SHORT, "objective.kd_ratio=1.0", f"run.folder={folder}", given) == 0
    lines = [line for line in RunFolder.read(folder).read_metrics() if "loss" in line]
    assert streams(lines) == {"dataset", "text"}
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/dataset"] + 0.5 * line["loss/text"], rel=1e-4)


def test_a_reward_sees_the_row_and_moves_the_loss(place):
    (place / "reward.py").write_text("def short(prompt, answer, reference, row):\n    return len(row['output']) - len(answer)\n")
    lines = run(place, "reward", f"author: student, reward: {{function: '{place}/reward.py:short'}}", "objective.divergence=reverse_kl")
    assert all("rollouts/reward" in line for line in lines)


def test_a_reward_that_failed_is_mended_and_the_run_goes_on(place, capsys):
    file, folder = place / "failing.py", place / "mended"
    body = "seen = []\ndef give(prompt, answer, reference, row):\n    seen.append(answer)\n    return 1 / (9 - len(seen))\n"
    file.write_text(body)
    reward = f"rollouts={{author: student, reward: {{function: '{file}:give'}}, {SAMPLING}}}"
    command = ("distill", place / "r.yaml", *SHORT, "training.steps=4", f"run.folder={folder}", "objective.divergence=reverse_kl", reward)
    assert potstill(*command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "ZeroDivisionError: division by zero; mend it and go on with --override-resume rollouts.reward.function" in said
    file.write_text(body.replace("9 - ", "9 + "))
    assert potstill(*command) != 0, "another function is another objective"
    assert "or go on regardless with --override-resume rollouts.reward.function" in " ".join(capsys.readouterr().err.split())
    assert potstill(*command, "--override-resume", "rollouts.reward.function") == 0
    assert [line["step"] for line in RunFolder.read(folder).read_metrics() if "loss" in line] == [1, 2, 3, 4]


def test_a_share_of_nothing_is_the_run_off_policy_bit_for_bit(place):
    common = ("training.steps=3", "run.seed=5")
    run(place, "share-of-nothing", "author: mixture, student: 0.0", *common)
    off = place / "off-policy"
    assert potstill("distill", place / "r.yaml", *SHORT, f"run.folder={off}", "data.packing=false", *common) == 0
    ours, theirs = ((place / name / "student" / "model.safetensors").read_bytes() for name in ("share-of-nothing", "off-policy"))
    assert ours == theirs


def test_an_on_policy_run_goes_on_where_it_stopped(place):
    given = ("author: replay, replay: {start: 0.7, capacity: 6}", "objective.divergence=skew_forward_kl", "training.save_steps=2")
    # DistiLLM's own schedule follows the length of the run, which changes here; a constant one does not.
    constant = given[0].replace("capacity: 6", "capacity: 6, schedule: constant")
    run(place, "whole-constant", constant, *given[1:], "training.steps=4", "training.scheduler=constant")
    for steps in (2, 4):
        run(place, "halves-constant", constant, *given[1:], f"training.steps={steps}", "training.scheduler=constant")
    assert RunFolder.read(place / "halves-constant").read_summary()["resumed_from"] == 2
    whole, halves = ((place / name / "student" / "model.safetensors").read_bytes() for name in ("whole-constant", "halves-constant"))
    assert whole == halves
