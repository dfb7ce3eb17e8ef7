"""Two gloo ranks are one process, under DDP and FSDP2; and they agree when something goes wrong on one of them.

All runs of the ranks happen in one launch of torchrun, because starting it costs more than they do.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from potstill.run_folder import RunFolder
from ranks_plan import BASE, EQUAL, FAULTS, NARROW, RESUMED, legs
from small_runs import Run, execute, furthest, make_distiller, weights

WORKER = Path(__file__).resolve().parents[1] / "ranks_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """The folder in which two ranks have left their runs."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, run in RESUMED.items():
        execute(legs(run)[0], folder / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def _facts(ranks: Path, name: str) -> list[dict]:
    return [json.loads((ranks / f"{name}-{rank}.json").read_text()) for rank in range(2)]


def _alone(run: Run, folder: Path) -> tuple[dict, float | None]:
    distiller, summary = execute(run.but(fsdp=False), folder)
    return weights(distiller), summary.best_loss


def _of_the_text(key: str) -> bool:
    return key.startswith("rollouts/") and not key.endswith("seconds")


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_are_one_process(name, ranks, tmp_path):
    alone, best_loss = _alone(EQUAL[name], tmp_path / "run")
    together, facts = load_file(ranks / f"{name}.safetensors"), _facts(ranks, name)
    assert furthest(alone, weights(make_distiller(EQUAL[name]))) > 1e-3
    assert furthest(together, alone) < 1e-6
    assert facts[0]["best_loss"] == facts[1]["best_loss"] == pytest.approx(best_loss, abs=1e-6)
    # On a CPU accelerate would make DDP out of FSDP without a word.
    assert facts[0]["sharded"] == facts[1]["sharded"] == name.startswith("fsdp")
    here, there = RunFolder.read(tmp_path / "run"), RunFolder.read(ranks / name)
    assert here.read_samples() == there.read_samples()
    losses = [[(line["step"], line["loss"], line["target_tokens"]) for line in f.read_metrics() if "loss" in line] for f in (here, there)]
    assert losses[1] == [(step, pytest.approx(loss, abs=1e-5), targets) for step, loss, targets in losses[0]]
    told = [{f"{line['step']} {key}": line[key] for line in f.read_metrics() for key in line if _of_the_text(key)} for f in (here, there)]
    assert told[1] == pytest.approx(told[0], abs=1e-5)
    assert bool(told[0]) == (EQUAL[name].author is not None)


@pytest.mark.parametrize("name", NARROW)
def test_sharded_ranks_in_bfloat16_sum_losses_and_gradients_in_float32(name, ranks, tmp_path):
    """Left to itself accelerate rounds a sharded model's outputs, here the loss, to three digits."""
    alone, best_loss = _alone(NARROW[name], tmp_path / "run")
    together = load_file(ranks / f"{name}.safetensors")
    moved = furthest(alone, weights(make_distiller(NARROW[name])))
    assert {tensor.dtype for tensor in together.values()} == {torch.float32}
    assert furthest(together, alone) < 0.2 * moved
    assert [fact["best_loss"] for fact in _facts(ranks, name)] == [pytest.approx(best_loss, abs=1e-4)] * 2
    losses = [
        [line["loss"] for line in RunFolder.read(folder).read_metrics() if "loss" in line] for folder in (tmp_path / "run", ranks / name)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize("name", RESUMED)
def test_one_then_two_then_one(name, ranks, tmp_path):
    """The order of samples does not know how many ranks there are, and a checkpoint fits any number."""
    _, last = legs(RESUMED[name])
    resumed, summary = execute(last, ranks / name)
    straight, _ = execute(last, tmp_path / "straight")
    assert summary.resumed_from == 4
    assert furthest(weights(resumed), weights(straight)) < 1e-5
    assert RunFolder.read(ranks / name).read_samples() == RunFolder.read(tmp_path / "straight").read_samples()


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if "signal" not in fault.kind and name != "skipped_on_all"])
def test_what_is_not_finite_on_one_rank_is_stepped_on_none(name, ranks, tmp_path):
    fault, facts = FAULTS[name], _facts(ranks, name)
    assert [fact["error"] for fact in facts] == ["NonFiniteError"] * 2
    assert "step 2" in facts[0]["message"]
    execute(fault.run.but(fsdp=False), tmp_path / "run")
    assert [line["step"] for line in RunFolder.read(ranks / name).read_samples()] == [1]
    incident = json.loads((ranks / name / "non_finite.json").read_text())[0]
    order = RunFolder.read(tmp_path / "run").read_samples()[1]
    assert incident["examples"] == order["examples"]


def test_ranks_skip_together(ranks):
    assert [fact["skipped"] for fact in _facts(ranks, "skipped_on_all")] == [1, 1]


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if "signal" in fault.kind])
def test_a_signal_to_one_rank_stops_all_and_loses_nothing(name, ranks, tmp_path):
    facts = _facts(ranks, name)
    assert [(fact["error"], fact["exit_code"]) for fact in facts] == [("InterruptedRun", 143)] * 2
    resumed, summary = execute(FAULTS[name].run.but(fsdp=False), ranks / name)
    assert summary.resumed_from == 1
    assert furthest(weights(resumed), _alone(FAULTS[name].run, tmp_path / "run")[0]) < 1e-6


def test_ranks_listen_on_the_loopback_alone(ranks):
    """127.0.0.1 and ::1 as /proc/net/tcp writes them; the launcher's own store is not ours."""
    local = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    for fact in _facts(ranks, "ddp"):
        assert set(fact["listening"]) <= local


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (3, 3)])
def test_what_ranks_cannot_share_is_refused(batch_size, accumulation, tmp_path, monkeypatch):
    from potstill.errors import ConfigError

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="make accumulation a multiple of 2"):
        execute(replace(BASE).but(batch_size=batch_size, accumulation=accumulation), tmp_path / "run")


def test_sharding_needs_ranks(tmp_path):
    from potstill.errors import ConfigError

    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        execute(BASE.but(fsdp=True), tmp_path / "run")
