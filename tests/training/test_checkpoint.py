"""Checkpoints: the state comes back bit by bit, torn ones are named and passed over, rotation keeps the good, nothing executes."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from faultfs import without_syncing
from potstill import storage
from potstill.errors import IncompatibleError, StorageError
from potstill.training import state as states
from potstill.training.checkpoint import (
    CheckpointState,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    refuse_other,
    rotate,
    save_checkpoint,
)


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def _state(step: int = 1) -> CheckpointState:
    return CheckpointState({"weights": {"w": torch.full((4,), float(step))}}, {"step": step})


def _save(folder: Path, *steps: int, keep: int = 10, best: int | None = None) -> None:
    for step in steps:
        save_checkpoint(folder, step, _state(step), keep=keep, best=best)


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


# ---------------------------------------------------------------- the state comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_tensors_and_numbers_come_back_exactly(dtype, tmp_path):
    numbers = {"rate": 0.1 + 0.2, "tiny": 5e-324, "big": 2**80, "text": "漢\n", "nested": {"list": [1, None, True]}}
    tensors = {"a": (torch.randn(5, 3) * 100).to(dtype), "scalar": torch.tensor(3).to(dtype), "none": torch.zeros(0, 2, dtype=dtype)}
    save_checkpoint(tmp_path, 7, CheckpointState({"weights": tensors, "empty": {}}, numbers), keep=1)
    loaded = load_checkpoint(checkpoint_path(tmp_path, 7))
    assert loaded.numbers == numbers
    assert loaded.tensors["empty"] == {}
    for name, tensor in tensors.items():
        assert loaded.tensors["weights"][name].dtype == dtype
        assert torch.equal(loaded.tensors["weights"][name], tensor)


def test_large_groups_are_split_into_files_of_bounded_size(tmp_path):
    tensors = {f"layer.{number}": torch.randn(100) for number in range(10)} | {"wide": torch.randn(1000)}
    save_checkpoint(tmp_path, 1, CheckpointState({"weights": tensors}, {}), keep=1, bytes_per_file=1000)
    files = [path.stat().st_size for path in checkpoint_path(tmp_path, 1).glob("*.safetensors")]
    assert len(files) == 6
    loaded = load_checkpoint(checkpoint_path(tmp_path, 1)).tensors["weights"]
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_share_memory_or_are_views_come_back(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "same": whole, "column": whole[:, 1], "transposed": whole.T}
    save_checkpoint(tmp_path, 1, CheckpointState({"weights": tensors}, {}), keep=1)
    loaded = load_checkpoint(checkpoint_path(tmp_path, 1)).tensors["weights"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "adamw_amsgrad_capturable": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.01), amsgrad=True, foreach=False),
    "sgd_momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
}


def _training(optimizer_name: str):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    model[0].bias.requires_grad_(False)
    decay = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim == 1]
    optimizer = OPTIMIZERS[optimizer_name]([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return model, optimizer, scheduler


def _train(model, optimizer, scheduler, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(3, 4)).pow(2).sum().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_restored_process_goes_on_bit_by_bit(optimizer_name, tmp_path):
    """N5, at the smallest scale: weights, moments, schedule."""
    model, optimizer, scheduler = _training(optimizer_name)
    _train(model, optimizer, scheduler, range(3))
    tensors, numbers = states.optimizer_state(optimizer, model)
    saved = CheckpointState(
        {"weights": states.weights(model), "optimizer": tensors}, {"optimizer": numbers, "scheduler": states.plain(scheduler.state_dict())}
    )
    save_checkpoint(tmp_path, 3, saved, keep=1)
    _train(model, optimizer, scheduler, range(3, 7))
    expected = states.weights(model)

    model, optimizer, scheduler = _training(optimizer_name)
    loaded = load_checkpoint(checkpoint_path(tmp_path, 3))
    states.restore_weights(model, loaded.tensors["weights"])
    states.restore_optimizer(optimizer, model, loaded.tensors["optimizer"], loaded.numbers["optimizer"])
    scheduler.load_state_dict(states.restored(loaded.numbers["scheduler"]))
    _train(model, optimizer, scheduler, range(3, 7))
    assert all(torch.equal(expected[name], tensor) for name, tensor in states.weights(model).items())


def test_what_the_recipe_says_of_the_optimizer_is_todays_word():
    """A weight decay changed by --override-resume takes effect; the learning rate is where the schedule had brought it."""
    model, optimizer, scheduler = _training("adamw")
    _train(model, optimizer, scheduler, range(3))
    tensors, numbers = states.optimizer_state(optimizer, model)
    changed_model, changed, _ = _training("adamw")
    for group in changed.param_groups:
        group["weight_decay"] = 0.7
    states.restore_optimizer(changed, changed_model, tensors, numbers)
    assert [group["weight_decay"] for group in changed.param_groups] == [0.7, 0.7]
    assert changed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.01


@pytest.mark.parametrize("left_out", ["optimizer", "scheduler"])
def test_each_part_of_the_state_matters(left_out):
    """The test above can fail: without any one part the result differs."""
    model, optimizer, scheduler = _training("adamw")
    _train(model, optimizer, scheduler, range(3))
    tensors, numbers = states.optimizer_state(optimizer, model)
    kept = states.weights(model), states.plain(scheduler.state_dict())
    _train(model, optimizer, scheduler, range(3, 7))
    expected = states.weights(model)
    model, optimizer, scheduler = _training("adamw")
    states.restore_weights(model, kept[0])
    if left_out != "optimizer":
        states.restore_optimizer(optimizer, model, tensors, numbers)
    if left_out != "scheduler":
        scheduler.load_state_dict(states.restored(kept[1]))
    _train(model, optimizer, scheduler, range(3, 7))
    assert not all(torch.equal(expected[name], tensor) for name, tensor in states.weights(model).items())


def test_names_do_not_depend_on_wrappers():
    assert states.plain_name("module._orig_mod.layers.0._checkpoint_wrapped_module.weight") == "layers.0.weight"
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert states.trainable_parameters(wrapped).keys() == states.trainable_parameters(model).keys()


def test_another_model_is_refused_by_name():
    model = torch.nn.Linear(2, 2)
    saved = states.weights(model)
    with pytest.raises(IncompatibleError, match="bias"):
        states.restore_weights(torch.nn.Linear(2, 2, bias=False), saved)
    with pytest.raises(IncompatibleError, match="weight"):
        states.restore_weights(torch.nn.Linear(3, 2), saved)
    with pytest.raises(IncompatibleError, match="bfloat16"):
        states.restore_weights(torch.nn.Linear(2, 2).bfloat16(), saved)
    optimizer = torch.optim.AdamW(model.parameters())
    tensors, numbers = states.optimizer_state(optimizer, model)
    with pytest.raises(IncompatibleError, match="groups"):
        states.restore_optimizer(torch.optim.AdamW([model.weight]), model, tensors, numbers)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 0.1, True, None, "x", [1, [2.5]], {"a": {"b": -0.0}}])
def test_plain_and_restored_are_inverse(value):
    assert repr(states.restored(json.loads(storage.to_json(states.plain(value))))) == repr(value)


def test_scalars_of_numpy_and_torch_become_numbers_and_objects_are_refused():
    assert states.plain((numpy.float64(0.5), torch.tensor(2), numpy.bool_(True))) == [0.5, 2, True]
    assert numpy.isnan(states.restored(states.plain(float("nan"))))
    for value in (object(), torch.ones(2), {1, 2}, lambda: None):
        with pytest.raises(TypeError):
            states.plain(value)


def test_fingerprints_of_another_run_are_refused_by_name():
    refuse_other({"data": "a", "teacher": "b"}, {"data": "a", "teacher": "b"})
    with pytest.raises(IncompatibleError, match=r"another teacher.*--fresh"):
        refuse_other({"data": "a", "teacher": "b"}, {"data": "a", "teacher": "c"})
    refuse_other({"data": "a", "some.key": "b"}, {"data": "a", "some.key": "c"}, ["some.key"])
    for overridden in ([], ["other.key"]):
        with pytest.raises(IncompatibleError, match=r"another some\.key.*--override-resume some\.key"):
            refuse_other({"some.key": "b"}, {"some.key": "c"}, overridden)


# ---------------------------------------------------------------- which checkpoint is the latest


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


TEARS = {
    "no manifest": lambda folder: (folder / storage.MANIFEST).unlink(),
    "half a manifest": lambda folder: _truncate(folder / storage.MANIFEST),
    "half the weights": lambda folder: _truncate(folder / "weights-00000.safetensors"),
    "no weights": lambda folder: (folder / "weights-00000.safetensors").unlink(),
    "other numbers": lambda folder: (folder / "state.json").write_text('{\n "step": 9\n}'),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a link": lambda folder: (shutil.move(folder, folder.with_name("elsewhere")), folder.symlink_to(folder.with_name("elsewhere"))),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_newest_checkpoint_is_passed_over_and_named(tear, tmp_path):
    _save(tmp_path, 1, 2, 3)
    TEARS[tear](checkpoint_path(tmp_path, 3))
    found = latest_checkpoint(tmp_path)
    assert found.step == 2
    assert found.path == checkpoint_path(tmp_path, 2)
    assert len(found.torn) == 1
    assert found.torn[0].startswith("step-00000003: ")
    with pytest.raises((StorageError, OSError)):
        load_checkpoint(checkpoint_path(tmp_path, 3))


def test_without_any_whole_checkpoint_the_run_begins_again_and_says_why(tmp_path):
    assert latest_checkpoint(tmp_path / "absent").path is None
    _save(tmp_path, 1)
    _truncate(checkpoint_path(tmp_path, 1) / "state.json")
    found = latest_checkpoint(tmp_path)
    assert (found.path, found.step, len(found.torn)) == (None, 0, 1)


def test_every_flipped_bit_of_a_checkpoint_is_found_before_it_is_used(tmp_path):
    """F8."""
    _save(tmp_path, 1, 2)
    draw = random.Random(0)
    files = sorted(checkpoint_path(tmp_path, 2).iterdir())
    for _ in range(200):
        path = draw.choice(files)
        whole = path.read_bytes()
        flipped = bytearray(whole)
        bit = draw.randrange(8 * len(whole))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = latest_checkpoint(tmp_path)
        assert found.step == 1, f"bit {bit} of {path.name}"
        assert path.name in found.torn[0]
        path.write_bytes(whole)
    assert latest_checkpoint(tmp_path).step == 2


def test_a_torn_checkpoint_is_replaced_when_the_run_comes_back_to_its_step(tmp_path):
    _save(tmp_path, 1, 2)
    _truncate(checkpoint_path(tmp_path, 2) / "state.json")
    _save(tmp_path, 2)
    assert latest_checkpoint(tmp_path).step == 2
    assert latest_checkpoint(tmp_path).torn == ()


# ---------------------------------------------------------------- rotation (F30)


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    _save(tmp_path, 1, 2, 3, 4, 5, keep=2, best=2)
    assert _steps(tmp_path) == [2, 4, 5]
    _save(tmp_path, 6, keep=1, best=5)
    assert _steps(tmp_path) == [5, 6]


def test_torn_checkpoints_do_not_count_and_the_last_good_one_stays(tmp_path):
    _save(tmp_path, 1, 2, 3, 4)
    for step in (3, 4):
        _truncate(checkpoint_path(tmp_path, step) / storage.MANIFEST)
    rotate(tmp_path, keep=1)
    assert latest_checkpoint(tmp_path).step == 2
    rotate(tmp_path, keep=0)
    assert latest_checkpoint(tmp_path).step == 2


def test_too_little_space_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    """F5, the look before the leap."""
    _save(tmp_path, 1)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"step-00000002: [0-9,]+ bytes are needed and 1,000 are free"):
        _save(tmp_path, 2, keep=1)
    assert _steps(tmp_path) == [1]


# ---------------------------------------------------------------- nothing in a checkpoint executes (F31)


class _Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("name", ["state.json", "weights-00000.safetensors", "MANIFEST.json", "rng_state.pth", "weights-00001.safetensors"])
def test_a_pickle_in_place_of_any_file_never_fires(name, committed, tmp_path):
    """`committed`: by someone who can write a manifest too."""
    canary = tmp_path / "fired"
    _save(tmp_path, 1)
    folder = checkpoint_path(tmp_path, 1)
    (folder / name).write_bytes(pickle.dumps(_Canary(canary)))
    if committed:
        shutil.move(folder, tmp_path / "loose")
        files = [path for path in (tmp_path / "loose").iterdir() if path.name != "MANIFEST.json"]
        storage.commit_folder(folder, lambda unfinished: [shutil.copy(path, unfinished) for path in files])
    unlisted = not committed and name in ("rng_state.pth", "weights-00001.safetensors")
    manifest_made_anew = committed and name == "MANIFEST.json"
    if unlisted or manifest_made_anew:
        assert load_checkpoint(folder).numbers == {"step": 1}
    else:
        with pytest.raises(StorageError):
            load_checkpoint(folder)
    assert latest_checkpoint(tmp_path).path == (folder if committed or unlisted else None)
    assert not canary.exists()
