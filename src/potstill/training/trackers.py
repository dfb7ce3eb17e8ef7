"""Who else is shown a run's metrics: the Trainer's own callbacks, each on one run of its own below RUN/trackers.

What they are told is the run's name and its recipe, secrets blanked. A resumed run goes on with the run that its tracker had. A tracker
that fails costs one warning and never the run. All but wandb write to this machine alone, unless their own variables say otherwise.
"""

import contextlib
import io
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from potstill import storage
from potstill.environment import redact_text
from potstill.errors import StorageError
from potstill.recipe_changes import flatten
from potstill.run_folder import RunFolder

PROJECT = "potstill"
_IDS = "runs.json"
_PARAMETER_LENGTH = 500
_log = logging.getLogger("potstill")


def tracker_callbacks(names: Sequence[str], folder: RunFolder, step: int) -> list[TrainerCallback]:
    """One callback a tracker; `step` is where the run stands. Nothing is opened before training begins."""
    return [Tracker(name, lambda make=_MAKERS[name]: make(folder, step)) for name in names]


class Tracker(TrainerCallback):
    """One of the Trainer's callbacks, made when training begins and given up at its first failure."""

    def __init__(self, name: str, make: Callable[[], TrainerCallback]):
        self._name, self._make = name, make
        self._callback: TrainerCallback | None = None

    def _try(self, action: Callable[[TrainerCallback], object]) -> None:
        if self._callback is None:
            return
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # they greet there, where results are printed
                action(self._callback)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._callback = None
        said = redact_text(" ".join(str(error).split())[:300])
        _log.warning(
            "run.trackers: %s failed (%s: %s); the run goes on without it, and metrics.jsonl has every line",
            self._name, type(error).__name__, said,
        )  # fmt: skip

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._callback = self._make()
        except Exception as error:
            return self._give_up(error)
        return self._try(lambda callback: callback.on_train_begin(args, state, control, **more))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any):
        self._try(lambda callback: callback.on_log(args, state, control, **more))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any):
        self._try(lambda callback: callback.on_train_end(args, state, control, **more))
        self._callback = None


# ---------------------------------------------------------------- what each is opened with


def _place(folder: RunFolder, name: str) -> Path:
    storage.make_folder(folder.trackers / name)
    return folder.trackers / name


def _known_id(folder: RunFolder, name: str) -> str | None:
    """What a tracker called this run when it was first opened."""
    path = folder.trackers / _IDS
    try:
        return storage.read_lines(path)[0][-1].get(name) if path.exists() else None
    except (StorageError, IndexError, AttributeError):
        return None


def _keep_id(folder: RunFolder, name: str, identity: str) -> None:
    known = {other: found for other in _MAKERS if (found := _known_id(folder, other)) is not None}
    storage.make_folder(folder.trackers)
    storage.write_text(folder.trackers / _IDS, storage.to_json({**known, name: identity}) + "\n")


def _recipe(folder: RunFolder) -> dict[str, Any]:
    """Flat, and as it lies in the folder: with secrets blanked."""
    return flatten(folder.read_recipe())


def _tensorboard(folder: RunFolder, step: int) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    class OnOneFolder(TensorBoardCallback):
        """One folder is one run there; what a broken-off run wrote of steps that are done again is passed over."""

        def on_train_begin(self, args, state, control, **more):
            if self.tb_writer is not None:
                self.tb_writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in _recipe(folder).items()), step)

    return OnOneFolder(SummaryWriter(log_dir=str(_place(folder, "tensorboard")), purge_step=step + 1 if step else None))


def _wandb(folder: RunFolder, step: int) -> TrainerCallback:
    import wandb  # type: ignore[import-not-found]
    from transformers.integrations import WandbCallback

    class OnOneRun(WandbCallback):
        def setup(self, args, state, model, **more):
            self._initialized = True
            identity = _known_id(folder, "wandb") or uuid.uuid4().hex[:12]
            _keep_id(folder, "wandb", identity)
            # Its metadata would hold the command line, its console log what stands in the terminal: neither is asked for.
            settings = wandb.Settings(console="off", x_disable_meta=True, silent=True)
            wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.path.name, id=identity, resume="allow",
                dir=str(_place(folder, "wandb").parent), config=_recipe(folder), settings=settings,
            )  # fmt: skip
            wandb.define_metric("train/global_step")
            wandb.define_metric("*", step_metric="train/global_step", step_sync=True)

        def on_train_end(self, args, state, control, **more):
            wandb.finish()

    return OnOneRun()


def _trackio(folder: RunFolder, step: int) -> TrainerCallback:
    os.environ.setdefault("TRACKIO_DIR", str(_place(folder, "trackio")))  # read when it is imported
    import trackio  # type: ignore[import-not-found]
    from transformers.integrations import TrackioCallback

    class OnOneRun(TrackioCallback):
        def setup(self, args, state, model, **more):
            self._initialized = True
            trackio.init(project=PROJECT, name=folder.path.name, resume="allow", config=_recipe(folder), embed=False)

    return OnOneRun()


def _mlflow(folder: RunFolder, step: int) -> TrainerCallback:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow  # type: ignore[import-not-found]

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from transformers.integrations import MLflowCallback

    class OnOneRun(MLflowCallback):
        def setup(self, args, state, model, **more):
            self._initialized = self._auto_end_run = True
            self._async_log = False  # a failure is then known where it happens
            if "MLFLOW_TRACKING_URI" not in os.environ:
                mlflow.set_tracking_uri(_place(folder, "mlflow").as_uri())
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
            known = _known_id(folder, "mlflow")
            opened = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=folder.path.name)
            if known is None:  # a parameter cannot be changed there
                _keep_id(folder, "mlflow", opened.info.run_id)
                mlflow.log_params({key: str(value)[:_PARAMETER_LENGTH] for key, value in list(_recipe(folder).items())[:100]})

        def on_log(self, args, state, control, logs, model=None, **more):
            # In a store of files "loss" is a file, and then "loss/ce" cannot be one in a folder of that name.
            super().on_log(args, state, control, {name.replace("/", "_"): value for name, value in logs.items()}, model=model, **more)

    return OnOneRun()


_MAKERS: dict[str, Callable[[RunFolder, int], TrainerCallback]] = {
    "tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow,
}  # fmt: skip
