"""F5: a disk that will not hold the checkpoints is found before the first step."""

import pytest

from potstill import storage
from potstill.errors import StorageError
from small_runs import Run, execute, make_distiller, weights


def test_a_disk_too_small_for_the_checkpoints_is_found_before_the_first_step(tmp_path, monkeypatch):
    run = Run(student="lora", divergence=None, num_examples=6, training={"epochs": 1, "keep_checkpoints": 2})
    one = 3 * sum(tensor.nbytes for tensor in weights(make_distiller(run)).values())
    monkeypatch.setattr(storage, "free_bytes", lambda path: 3 * one - 1)
    with pytest.raises(StorageError, match=rf"checkpoints: {3 * one:,} bytes are needed and {3 * one - 1:,} are free"):
        execute(run, tmp_path / "run")
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    monkeypatch.setattr(storage, "free_bytes", lambda path: 3 * one + 2**20)
    execute(run, tmp_path / "run")
