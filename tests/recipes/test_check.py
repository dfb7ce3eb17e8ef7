"""`potstill check`: what it shows of a run, and what it refuses before a model is loaded; and the run refuses the same."""

import json

import pytest

from small_recipe import LORA, potstill
from tiny import save_pair


def test_check_tells_the_pipeline_an_example_and_the_cost(place, capsys):
    assert potstill("check", place / "r.yaml") == 0
    shown = capsys.readouterr().out
    for said in (
        "who writes the text",
        "the teacher answers",
        "positions",
        "outcomes",
        "distance",
        "0.5 x forward_kl + 0.5 x cross-entropy",
        "⟦",
        "<|im_end|>⟧",
        "read        36",
        "too long",
        "mean the same to both",
        "4 of 4 rows (2 x 2)",
        "together",
        "Nothing stands in the way",
    ):
        assert said in shown, said
    example = shown[shown.index("are targets") :]
    marked = example[example.rindex("⟦") + 1 : example.rindex("⟧")]
    assert "=" in marked
    assert "Add" not in marked


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.too_long=error", "data.max_tokens=20"], "data.too_long"),
        (["data.max_tokens=4096"], "512 positions"),
        ([LORA.replace("q_proj", "w_proj")], "w_proj"),
        (["data.columns={output: answer}"], "answer"),
    ],
)
def test_check_refuses_what_must_fail_with_the_remedy(place, capsys, overrides, said):
    assert potstill("check", place / "r.yaml", *overrides) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_teacher_that_reads_other_tokens_is_refused_by_check_and_by_the_run(place, capsys):
    other = place / "swapped"
    save_pair(other, 1)
    spec = json.loads((other / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    for command in ("check", "distill"):
        assert potstill(command, place / "r.yaml", f"teacher.path={other}", f"run.folder={place}/never") == 2
        assert "ids mean different tokens" in capsys.readouterr().err
    assert not (place / "never").exists()


def test_rows_without_an_answer_are_refused_before_a_model_is_loaded(place, capsys, monkeypatch):
    monkeypatch.setattr("potstill.recipes.assemble.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (place / "empty.jsonl").write_text('{"instruction": "x", "input": "", "output": ""}\n' * 3)
    arguments = (f"data.train={place}/empty.jsonl", "data.validation=null", f"run.folder={place}/never")
    assert potstill("distill", place / "r.yaml", *arguments) == 2
    assert "0 of 3 rows have target tokens" in capsys.readouterr().err
    assert not (place / "never").exists()


def test_content_cannot_command_the_terminal(place, capsys):
    rows = [{"instruction": "\x1b]0;owned\x07 \x1b[2J", "input": "", "output": f"\x1b[31m{n}"} for n in range(4)]
    (place / "ansi.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    potstill("check", place / "r.yaml", f"data.train={place}/ansi.jsonl", "data.validation=null")
    shown = capsys.readouterr()
    assert "\\x1b]0;owned" in shown.out
    assert "\x1b]" not in shown.out
    assert "\x1b[2J" not in shown.out


def test_check_tells_who_writes_and_refuses_prompts_without_room(place, capsys):
    given = "rollouts={author: mixture, student: 0.25, others: teacher, sampling: {max_new_tokens: 16, top_p: 0.9}}"
    assert potstill("check", place / "r.yaml", given) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for said in (
        "at each step the student, with probability 0.25, or the teacher",
        "on its own text 1 x forward_kl + 0 x cross-entropy",
        "prompts 32, the longest of 22 tokens",
        "temperature 1, top_p 0.9; up to 16 new tokens",
        "its answers end with <|im_end|>",
        "up to 4 answers side by side",
    ):
        assert said in shown, said
    for command in ("check", "distill"):
        wide = given.replace("16", "80")
        assert potstill(command, place / "r.yaml", wide, f"run.folder={place}/never") == 2
        assert "rollouts.prompt_too_long to drop or truncate_left" in capsys.readouterr().err
    assert not (place / "never").exists()


def test_what_the_teacher_reads_in_place_of_a_prompt_needs_room_too(place, capsys):
    given = ("rollouts={author: student, sampling: {max_new_tokens: 16}}", f"run.folder={place}/never", "objective.kd_ratio=1.0")
    asked = f"data.teacher_prompt='{{prompt}}{' and so on' * 12}'"
    for command in ("check", "distill"):
        assert potstill(command, place / "r.yaml", *given, asked) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "what the teacher reads in place of its prompt (data.teacher_prompt)" in said
        assert "rollouts.prompt_too_long" in said
    assert not (place / "never").exists()
    assert potstill("check", place / "r.yaml", *given, asked, "rollouts.prompt_too_long=truncate_left") == 0
    assert "32 prompts cut on the left" in " ".join(capsys.readouterr().out.split())


def test_an_end_that_the_teacher_does_not_know_is_refused_before_a_model_is_loaded(place, capsys, monkeypatch):
    other = place / "goes-on"
    save_pair(other, 0)
    stops = json.loads((other / "generation_config.json").read_text()) | {"eos_token_id": [2, 0]}
    (other / "generation_config.json").write_text(json.dumps(stops))
    monkeypatch.setattr("potstill.recipes.assemble.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    given = (f"student.path={other}", "rollouts={author: student, sampling: {max_new_tokens: 16}}", f"run.folder={place}/never")
    for command in ("check", "distill"):
        assert potstill(command, place / "r.yaml", *given) == 2
        error = capsys.readouterr().err
        assert "rollouts.foreign_end: an answer may end with '<|endoftext|>'" in error
    assert potstill("check", place / "r.yaml", *given, "rollouts.foreign_end=mask") == 0
    assert "at which one of both goes on: left out" in " ".join(capsys.readouterr().out.split())
