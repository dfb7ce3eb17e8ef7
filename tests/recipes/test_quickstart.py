"""The quickstart end to end: tiny for its structure, and (slow) at full size for what it claims."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill.data import tasks
from potstill.errors import UsageError
from potstill.models.config import ModelConfig
from potstill.models.loading import load_model
from potstill.recipes.quickstart import Plan, quickstart
from potstill.recipes.quickstart_models import Size, scramble
from potstill.run_folder import RunFolder

TINY = Plan(
    vocabulary_size=400, max_tokens=128, teacher=Size(32, 1, 2, 0.15), student=Size(24, 1, 2, 0.2), teacher_rows=120,
    transfer_rows=40, validation_rows=9, test_rows=18, teacher_steps=4, student_steps=4, batch_size=2, curve_points=2, seeds=(0, 1),
)  # fmt: skip


def _run(folder: Path, **changes) -> str:
    console = Console(file=io.StringIO(), width=120)
    quickstart(folder, quiet=True, console=console, **changes)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    return folder, _run(folder, plan=TINY)


def _record(folder: Path, name: str = "quickstart") -> dict:
    return json.loads((folder / "evaluation" / f"{name}.json").read_text())


def _pair(record: dict, metric: str) -> dict:
    return next(pair for pair in record["comparisons"] if pair["metric"] == f"test-tasks/{metric}")


def test_it_ends_with_one_table_the_differences_in_words_and_one_picture(finished):
    folder, printed = finished
    for said in ("teacher", "student, SFT", "student, KD", "2 seeds", "parameters", "exact-match accuracy", "bits per byte",
                 "top-1 agreement", "forward KL", "acceptance rate", "±", "its uncertainty", "cross-entropy on the validation"):
        assert said in printed
    record = _record(folder)
    teacher, sft, kd = record["models"]
    assert sft["num_parameters"] == kd["num_parameters"] < teacher["num_parameters"]
    names = ("exact_match", "bits_per_byte", "top1_agreement", "forward_kl", "acceptance_rate")
    assert set(sft["metrics"]) == {f"test-tasks/{name}" for name in names}
    assert set(teacher["metrics"]) == {"test-tasks/exact_match", "test-tasks/bits_per_byte"}
    assert all(metric["standard_error"] is not None for model in record["models"] for metric in model["metrics"].values())
    assert {pair["metric"] for pair in record["comparisons"]} == set(sft["metrics"])
    assert "eval_loss/ce" in (folder / "report.html").read_text() or "cross-entropy" in (folder / "report.html").read_text()


def test_a_pair_of_students_starts_from_the_same_weights_and_sees_the_same_rows_in_the_same_order(finished):
    folder, _ = finished
    recipes = {name: RunFolder.read(folder / name).read_recipe() for name in ("sft-0", "kd-0", "sft-1")}
    assert (folder / "sft-0" / "samples.jsonl").read_bytes() == (folder / "kd-0" / "samples.jsonl").read_bytes()
    assert (folder / "sft-0" / "samples.jsonl").read_bytes() != (folder / "sft-1" / "samples.jsonl").read_bytes()
    starts = {}
    for name, recipe in recipes.items():
        config = ModelConfig(path=recipe["student"]["path"], weights="random")
        starts[name] = load_model(config, seed=recipe["run"]["seed"]).state_dict()
    assert all(torch.equal(weight, starts["kd-0"][name]) for name, weight in starts["sft-0"].items())
    assert not all(torch.equal(weight, starts["sft-1"][name]) for name, weight in starts["sft-0"].items())
    differing = {section for section in recipes["sft-0"] | recipes["kd-0"] if recipes["sft-0"].get(section) != recipes["kd-0"].get(section)}
    assert differing == {"teacher", "objective", "run"}, "a pair differs in what it learns from and where it is written"
    # The first loss is before any step: cross-entropy on the same rows with the same weights.
    first = {name: json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[0])["loss/ce"] for name in ("sft-0", "kd-0")}
    assert first["sft-0"] == pytest.approx(first["kd-0"], rel=1e-6)


def test_students_learn_from_other_tasks_than_the_teacher_and_the_exam(finished):
    folder, _ = finished
    for split in tasks.SHARES:
        rows = [json.loads(line) for line in (folder / "data" / f"{split}.jsonl").read_text().splitlines()]
        assert rows
        assert {tasks.split_of(row["kind"], row["input"]) for row in rows} == {split}


def test_every_training_is_an_ordinary_run_and_its_student_an_ordinary_model(finished):
    folder, _ = finished
    for name in ("teacher", "sft-0", "kd-0", "sft-1", "kd-1"):
        assert RunFolder.read(folder / name).status == "finished"
    tokenizer = AutoTokenizer.from_pretrained(folder / "kd-0" / "student")
    model = AutoModelForCausalLM.from_pretrained(folder / "kd-0" / "student")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    text = "What is 12 + 30? Über 漢字\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_same_command_does_not_train_again_and_says_the_same(finished):
    folder, printed = finished
    before = {name: (folder / name / "metrics.jsonl").read_bytes() for name in ("teacher", "kd-1")}
    record = _record(folder)
    again = _run(folder, plan=TINY)
    assert {name: (folder / name / "metrics.jsonl").read_bytes() for name in before} == before
    assert _record(folder) == record
    table = printed[printed.index("A teacher and its students") :].rpartition(" s. The loss")[0].rpartition("\n")[0]
    assert table in again


def test_a_scrambled_teacher_is_another_teacher_of_the_same_numbers(finished, tmp_path):
    folder, _ = finished
    scramble(folder / "teacher" / "student", tmp_path / "scrambled")
    honest = AutoModelForCausalLM.from_pretrained(folder / "teacher" / "student").state_dict()
    scrambled = AutoModelForCausalLM.from_pretrained(tmp_path / "scrambled").state_dict()
    assert honest.keys() == scrambled.keys()
    for name, weight in honest.items():
        assert torch.equal(weight.flatten().sort().values, scrambled[name].flatten().sort().values)
    assert not torch.equal(honest["model.embed_tokens.weight"], scrambled["model.embed_tokens.weight"])


def test_scrambling_keeps_the_honest_runs_and_says_what_it_did(finished):
    folder, _ = finished
    record = _record(folder)
    printed = _run(folder, plan=TINY, scramble_teacher=True)
    assert "scrambled" in printed
    assert RunFolder.read(folder / "kd-scrambled-0").read_recipe()["teacher"]["path"] == str(folder / "scrambled")
    assert _record(folder) == record
    of_sft = [one["models"][1]["metrics"]["test-tasks/exact_match"] for one in (_record(folder, "scrambled"), record)]
    assert of_sft[0] == of_sft[1]


def test_another_plan_and_a_foreign_folder_are_refused(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(UsageError, match="--fresh"):
        _run(folder, plan=replace(TINY, student_steps=5))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="neither empty nor a quickstart"):
        _run(tmp_path, plan=TINY, fresh=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_the_gain_is_there_with_the_teacher_and_vanishes_when_it_is_scrambled(tmp_path):
    _run(tmp_path / "quickstart")
    honest = _record(tmp_path / "quickstart")
    gains = {"exact_match": 1, "bits_per_byte": -1, "top1_agreement": 1, "forward_kl": -1, "acceptance_rate": 1}
    for metric, sign in gains.items():
        assert _pair(honest, metric)["difference"] * sign > 0, _pair(honest, metric)["verdict"]
    # A few seeds leave few degrees of freedom: not every single difference must be larger than its uncertainty, but some are.
    assert any(_pair(honest, metric)["is_significant"] for metric in gains)
    _run(tmp_path / "quickstart", scramble_teacher=True)
    scrambled = _record(tmp_path / "quickstart", "scrambled")
    assert scrambled["models"][0]["metrics"]["test-tasks/exact_match"]["value"] < 0.1, "nothing is left in a scrambled teacher"
    for metric in ("exact_match", "bits_per_byte"):
        pair = _pair(scrambled, metric)
        assert not (pair["is_significant"] and pair["difference"] * gains[metric] > 0), pair["verdict"]
