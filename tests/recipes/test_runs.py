"""Whole runs through the command line: distil, resume, start over, fine-tune, merge, measure; no secret and no socket left behind."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill.run_folder import RunFolder
from small_recipe import LORA, potstill
from tiny import save_pair


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """The run folder of a finished distillation."""
    if potstill("distill", place / "r.yaml", "--quiet") != 0:
        pytest.fail("the first run failed")
    return place / "run"


def test_a_run_leaves_a_student_that_transformers_loads(place, finished):
    folder = RunFolder.read(finished)
    assert folder.status == "finished"
    summary = folder.read_summary()
    assert (summary["command"], summary["steps"]) == ("distill", 4)
    assert folder.read_recipe()["objective"]["divergence"] == "forward_kl"
    losses = [line["loss"] for line in folder.read_metrics() if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    student, tokenizer = (
        AutoModelForCausalLM.from_pretrained(finished / "student"),
        AutoTokenizer.from_pretrained(finished / "student"),
    )
    start = AutoModelForCausalLM.from_pretrained(place / "student")
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))
    assert tokenizer.chat_template is not None


def test_a_finished_run_says_so_and_changes_nothing(place, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    assert potstill("distill", place / "r.yaml", "--quiet") == 0
    assert "this run is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_another_recipe_is_refused_and_named(place, finished, capsys):
    assert potstill("distill", place / "r.yaml", "--quiet", "training.learning_rate=0.5") == 2
    error = capsys.readouterr().err
    assert "training.learning_rate: 0.001 -> 0.5" in error
    assert "--fresh" in error


def test_more_steps_go_on_and_fresh_starts_over(place, capsys):
    folder = place / "longer"
    arguments = ("distill", place / "r.yaml", "--quiet", f"run.folder={folder}")
    assert potstill(*arguments, "training.steps=2") == 0
    assert potstill(*arguments, "training.steps=3") == 0
    assert RunFolder.read(folder).read_summary()["resumed_from"] == 2
    assert [line["step"] for line in RunFolder.read(folder).read_samples()] == [1, 2, 3]
    assert potstill(*arguments, "training.steps=2") == 2
    assert potstill(*arguments, "training.steps=2", "--fresh") == 0
    assert RunFolder.read(folder).read_summary()["resumed_from"] is None


def test_a_run_that_never_began_refuses_no_mended_recipe(place, capsys):
    folder = place / "mended"
    arguments = ("distill", place / "r.yaml", "--quiet", f"run.folder={folder}", "training.steps=1")
    assert potstill(*arguments, "student.lora={rank: 2, targets: [no_such_layer]}") == 2
    assert "no_such_layer" in capsys.readouterr().err
    assert RunFolder.look(folder, {}) == "new"
    assert potstill(*arguments, LORA) == 0


def test_finetune_with_lora_exports_adapter_and_merged_student_and_merges_again(place, capsys):
    folder = place / "teacher-lora"
    assert (
        potstill(
            "finetune",
            place / "r.yaml",
            "--quiet",
            "teacher=null",
            "objective=null",
            LORA,
            "training.steps=2",
            f"run.folder={folder}",
        )
        == 0
    )
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "student" / "adapter_config.json").exists()
    again = place / "again"
    assert potstill("export", folder, "--output", again, "--merge") == 0
    merged, twice = (AutoModelForCausalLM.from_pretrained(at / "student") for at in (folder, again))
    for ours, theirs in zip(merged.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # As the adapter of a teacher, as the library's recipes use it.
    out = place / "taught"
    adapted = (f"teacher.path={place}/student", f"teacher.adapter={folder}/adapter", "training.steps=1", f"run.folder={out}")
    assert potstill("distill", place / "r.yaml", "--quiet", *adapted) == 0
    assert potstill("distill", place / "r.yaml", "--quiet", f"teacher.adapter={folder}/adapter", f"run.folder={out}-2") == 2
    assert "cannot be put on" in capsys.readouterr().err


def test_checkpoints_are_measured_and_exported_as_the_students_that_they_were(place, capsys, monkeypatch):
    """A checkpoint's student equals the run's own one at its last step, with an adapter too; before it is another."""
    monkeypatch.chdir(place)
    folder = place / "kept"
    arguments = ("teacher=null", "objective=null", LORA, "training.save_steps=2", "training.keep_checkpoints=3", f"run.folder={folder}")
    assert potstill("finetune", place / "r.yaml", "--quiet", *arguments) == 0
    steps = [folder / "checkpoints" / f"step-0000000{step}" for step in (2, 4)]
    for step in steps:
        assert potstill("export", step, "--output", place / "exported" / step.name) == 0
    half, whole = (AutoModelForCausalLM.from_pretrained(place / "exported" / step.name / "student").state_dict() for step in steps)
    final = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    assert all(torch.equal(weight, final[name]) for name, weight in whole.items())
    assert not all(torch.equal(weight, final[name]) for name, weight in half.items())
    assert (place / "exported" / steps[0].name / "adapter" / "adapter_model.safetensors").is_file()

    record = place / "steps.json"
    models = (f"half={steps[0]}", f"whole={steps[1]}", f"end={folder}")
    assert potstill("evaluate", *models, "--data", place / "rows.jsonl", "--output", record, "--quiet") == 0
    values = {model["name"]: model["metrics"]["rows/cross_entropy"]["value"] for model in json.loads(record.read_text())["models"]}
    assert values["whole"] == values["end"] != values["half"]
    assert (folder / "evaluation" / steps[0].name / "student").is_dir()

    weights = next(steps[0].glob("weights-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4])
    capsys.readouterr()
    assert potstill("export", steps[0], "--output", place / "torn") == 2
    assert "this checkpoint is torn (weights-00000.safetensors" in capsys.readouterr().err


def test_the_distance_to_the_teacher_falls_and_evaluate_sees_it(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    folder = place / "pure"
    arguments = ("objective.kd_ratio=1", "training.steps=12", "training.learning_rate=5e-3", f"run.folder={folder}")
    assert potstill("distill", place / "r.yaml", "--quiet", *arguments) == 0
    found = []
    for model in (place / "student", folder):
        record = place / "record.json"
        assert potstill("evaluate", model, "--data", place / "rows.jsonl", "--teacher", place / "teacher", "--output", record) == 0
        metrics = json.loads(record.read_text())["models"][0]["metrics"]
        found.append({name.removeprefix("rows/"): metric for name, metric in metrics.items()})
    assert found[1]["forward_kl"]["value"] < 0.9 * found[0]["forward_kl"]["value"]
    assert found[1]["forward_kl"]["standard_error"] > 0
    expected = {"perplexity", "bits_per_byte", "reverse_kl", "jsd", "total_variation", "acceptance_rate", "entropy_gap"}
    assert expected <= set(found[1])


def test_bad_lines_that_may_be_left_out_are_kept_beside_the_run(place, capsys):
    (place / "bad.jsonl").write_text((place / "rows.jsonl").read_text() + "{oops\n")
    folder = place / "rejects"
    arguments = (f"data.train={place}/bad.jsonl", "data.on_bad_line={skip: 1}", "training.steps=1", f"run.folder={folder}")
    assert potstill("distill", place / "r.yaml", "--quiet", *arguments) == 0
    assert "1 bad row left out" in capsys.readouterr().err
    assert json.loads((folder / "rejected.jsonl").read_text())["origin"] == f"{place}/bad.jsonl:37"


# ---------------------------------------------------------------- secrets, sockets, ranks


def test_code_that_ships_with_a_model_is_run_by_no_command(place, capsys):
    shipped, mark = place / "shipped", place / "it-ran"
    save_pair(shipped, 2)
    imports = "from transformers import LlamaConfig as C, LlamaForCausalLM as M"
    (shipped / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n{imports}\n")
    config = json.loads((shipped / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (shipped / "config.json").write_text(json.dumps(config))
    (shipped / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}))
    for side in ("student", "teacher"):
        for command in ("check", "distill"):
            assert potstill(command, place / "r.yaml", f"{side}.path={shipped}", f"run.folder={place}/never") == 2
    assert potstill("evaluate", shipped, "--data", place / "rows.jsonl") == 2
    assert potstill("check", place / "r.yaml", f"student.path={shipped}", "student.trust_remote_code=true") == 2
    error = capsys.readouterr().err
    assert "trust_remote_code" in error
    assert "Traceback" not in error
    assert not mark.exists()


CANARY = "hf_canaryCANARYcanaryCANARYcanary12"


def test_a_secret_is_in_no_output_and_no_file(place, capsys, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    folder = place / "canary"
    arguments = ("distill", place / "r.yaml", "training.steps=1", f"run.folder={folder}")
    assert potstill(*arguments) == 0
    assert potstill(*arguments, f"student.path=https://me:{CANARY}@example.org/model") == 2
    assert potstill(*arguments, f"data.train=/nowhere/{CANARY}.jsonl") == 2
    assert potstill("check", place / "r.yaml", f"training.{CANARY}=1") == 2
    shown = capsys.readouterr()
    assert CANARY not in shown.out + shown.err
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


def _listening() -> set[str]:
    """Sockets of this process that listen, by inode."""
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return {fields[9] for fields in lines if fields[3] == "0A" and fields[9] in inodes}


def test_a_run_listens_on_no_socket(place):
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.wait(0.02):
            seen.update(_listening())

    thread = threading.Thread(target=watch)
    thread.start()
    code = potstill("distill", place / "r.yaml", "--quiet", "training.steps=2", f"run.folder={place}/deaf")
    stop.set()
    thread.join()
    assert code == 0
    assert not seen


def test_two_ranks_under_torchrun_make_the_run_of_one(place, finished):
    folder = place / "ranks"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "potstill",
            "distill",
            str(place / "r.yaml"),
            f"run.folder={folder}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished: 4 steps") == 1
    ours, theirs = (AutoModelForCausalLM.from_pretrained(at / "student").state_dict() for at in (finished, folder))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)
    assert [line["examples"] for line in RunFolder.read(folder).read_samples()] == [
        line["examples"] for line in RunFolder.read(finished).read_samples()
    ]


def test_a_real_teacher_and_a_real_student_on_real_stories(shared_data, tmp_path, capsys):
    models = shared_data / "models"
    (tmp_path / "stories.yaml").write_text(
        f"student: {{path: {models}/tinystories-279K-llama-hf}}\n"
        f"teacher: {{path: {models}/stories260K-llama-hf}}\n"
        f"data: {{train: {shared_data}/text/tinystories.train2085.jsonl.gz, validation: 0.2, format: text, max_tokens: 128, limit: 40,"
        " too_long: truncate_right}\n"
        "objective: {kd_ratio: 1.0}\n"
        "training: {steps: 12, batch_size: 8, learning_rate: 5e-4, warmup_steps: 2, precision: float32, logging_steps: 1}\n"
        f"run: {{folder: {tmp_path}/run}}\n"
    )
    assert potstill("check", tmp_path / "stories.yaml") == 0
    assert "512 tokens mean the same to both" in capsys.readouterr().out
    assert potstill("distill", tmp_path / "stories.yaml", "--quiet") == 0
    losses = [line["loss/kd"] for line in RunFolder.read(tmp_path / "run").read_metrics() if "loss/kd" in line]
    # The same 32 stories three times: a student of 279,232 parameters comes nearer to its teacher on them.
    assert 0.3 < sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 < 1.0
