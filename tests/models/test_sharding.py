"""Two ranks with half of the parameters each are one rank with all of them: teacher, student, gradient and export (FSDP2 on gloo)."""

import subprocess
import sys
from pathlib import Path

import pytest

from potstill.errors import ModelError
from potstill.models.config import LoadingConfig
from potstill.models.loading import load_model
from tiny import save_pair

TRIAL = Path(__file__).with_name("sharded_trial.py")


def test_two_ranks_equal_one(tmp_path):
    for name, tied in (("untied", False), ("tied", True)):
        save_pair(tmp_path / name, width=64, tied=tied)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TRIAL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for run in ("untied-whole", "untied-head", "tied-whole", "tied-head"):
        assert (tmp_path / run / "student" / "MANIFEST.json").exists()


def test_one_process_alone_cannot_shard(tmp_path):
    save_pair(tmp_path / "model", width=64)
    with pytest.raises(ModelError, match="start with torchrun"):
        load_model(LoadingConfig(path=str(tmp_path / "model")), sharded=True)


def test_quantised_weights_are_not_sharded(tmp_path):
    save_pair(tmp_path / "model", width=64)
    with pytest.raises(ModelError, match="quantised weights cannot be sharded"):
        load_model(LoadingConfig(path=str(tmp_path / "model"), quantization="4bit"), sharded=True)
