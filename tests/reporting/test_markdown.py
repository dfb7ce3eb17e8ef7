"""Results as Markdown: the numbers of the table, what was done in words, and no text that Markdown would take for its own."""

import pytest

import reported
from potstill.reporting.markdown import escaped, markdown, results_markdown, results_table
from potstill.reporting.pipeline import duration, in_words, outcome_in_words
from potstill.reporting.records import normalise
from potstill.reporting.summary import summarise, summarise_all


def test_a_run_says_how_it_was_trained_and_what_came_of_it(tmp_path):
    run = reported.write_run(tmp_path / "kd", reported.recipe(0.25, 3))
    text = results_markdown(summarise(run))
    for part in (
        "- teacher: models/teacher", "- objective: 0.75 × cross-entropy + 0.25 × forward KL", "- budget: 40 steps, batches of 8 rows",
        "- seed: 3", "- trained: 40 steps, 120,000 target tokens, 235,680 parameters, 62 s",
    ):  # fmt: skip
        assert part in text, part


def test_the_table_has_a_row_a_metric_and_a_column_a_model():
    lines = results_table(normalise(reported.evaluation())[0]).splitlines()
    assert lines[0] == "|  | teacher | before | SFT (3 seeds) | KD 0.5 (3 seeds) | KD 1 (3 seeds) |"
    assert all(line.count("|") == 7 for line in lines[:9])
    assert "| **arithmetic: exact-match accuracy ↑** | 0.6800 ± 0.0060 | 0.4100 ± 0.0060 | 0.5000 ± 0.0060 |" in lines[3]
    assert next(line for line in lines if "forward KL" in line).split("|")[2].strip() == ""


def test_a_model_that_stands_alone_shows_its_intervals():
    record = normalise(reported.evaluation())[0]
    record["models"] = record["models"][2:3]
    table = results_table(record)
    assert "95 % interval |" in table
    assert "| 0.4880 to 0.5120 |" in table


def test_a_study_is_one_text_with_a_section_a_cell(tmp_path):
    text = markdown([reported.write_study(tmp_path / "study", ratios=(0.0, 0.5), seeds=(0, 1), steps=20)])
    assert text.count("\n## ") == 3         # two cells and the warnings
    assert "- seeds: 0, 1" in text
    assert "The difference is larger than its uncertainty." in text
    assert "one row was too long" in text


def test_a_study_of_one_seed_keeps_its_title_and_the_names_of_its_cells(tmp_path):
    text = markdown([reported.write_study(tmp_path / "study", ratios=(0.0, 0.5, 1.0), seeds=(0,), steps=5)])
    assert text.startswith("# The weight of the divergence, plain\n")
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## kd\\_ratio=0.5", "## kd\\_ratio=1", "## sft", "## Warnings"]
    assert "| kd\\_ratio=1 | 0 | failed | out of memory |" in text
    assert "| sft | 0 |" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", r"a\|b"), ("**x** _y_ `z`", r"\*\*x\*\* \_y\_ \`z\`"), ("[x](javascript:1)", r"\[x\](javascript:1)"),
        ("<img src=x>&", "&lt;img src=x&gt;&amp;"), ("one\n\n# two", r"one \# two"), ("\\|", r"\\\|"), ("$x$", r"\$x\$"),
    ],
)  # fmt: skip
def test_what_markdown_would_take_for_its_own_is_escaped(text, expected):
    assert escaped(text) == expected


def test_hostile_names_stay_in_their_cells(tmp_path):
    hostile = "x | y\n\n<script>alert(1)</script> [a](b) `c`"
    record = normalise(reported.evaluation((hostile, "KD"), title=hostile))[0]
    table = results_table(record)
    assert "<script" not in table
    rows = [line.replace(r"\|", "").count("|") for line in table.splitlines() if line.startswith("|")]
    assert len(set(rows)) == 1


@pytest.mark.parametrize(
    ("recipe", "subject", "words"),
    [
        ({"teacher.kind": "cache", "teacher.path": "caches/8b"}, "teacher", "recorded answers in caches/8b"),
        ({"teacher.kind": "server", "teacher.model": "M", "teacher.url": "http://h"}, "teacher", "M behind a server at http://h"),
        ({"teacher.kind": "self"}, "teacher", "the student itself"), ({"a": 1}, "teacher", "none: the text alone is learned"),
        ({"rollouts.author": "mixture", "rollouts.student": 0.5}, "text",
         "the data set and the student in turn, 0.5 of it the student's"),
        ({"objective.divergence": "reverse_kl", "objective.kd_ratio": 1.0}, "objective", "reverse KL"),
        ({"objective.divergence": "jsd", "objective.kd_weight": 2.0, "objective.sft_weight": 0.5}, "objective",
         "0.5 × cross-entropy + 2 × Jensen-Shannon divergence"),
        ({"objective.divergence": "forward_kl", "objective.kd_ratio": 0.0}, "objective", "cross-entropy of the text"),
        ({"objective.kd_ratio": 1.0, "objective.support": "top_k_tail", "objective.top_k": 64, "objective.temperature": 2.0}, "objective",
         "forward KL, temperature 2, over top k tail (K = 64)"),
        ({"student.path": "m", "student.lora.rank": 8}, "student", "m, trained by LoRA of rank 8"),
        ({"data.train": [{"path": "a", "weight": 1}, {"path": "b"}]}, "data", "a + b"),
        ({"training.epochs": 2, "training.batch_size": 4, "training.accumulation": 8}, "budget", "2 epochs, batches of 4 × 8 rows"),
    ],
)  # fmt: skip
def test_a_recipe_in_words(recipe, subject, words):
    assert in_words(recipe)[subject] == words


def test_what_is_no_recipe_has_no_words():
    assert in_words({}) == {}
    assert outcome_in_words({}) == ""
    assert [duration(seconds) for seconds in (43.2, 750, 12_240)] == ["43 s", "12 min", "3.4 h"]


def test_odd_values_in_a_recipe_do_not_end_the_report(tmp_path):
    odd = {"objective": {"kd_ratio": "much", "temperature": "hot"}, "training": {"learning_rate": "fast", "steps": "many"}}
    run = reported.write_run(tmp_path / "odd", reported.recipe(0.5, 0) | odd)
    assert "fast" in results_markdown(summarise_all([run])[0])
