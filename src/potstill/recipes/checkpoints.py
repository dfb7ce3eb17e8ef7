"""The student as it was at a checkpoint of its run: put together again, and written as a folder that `from_pretrained` reads.

A checkpoint holds what was trained and nothing else, so the run's recipe says what it is put into. Trains nothing, knows no data.
"""

import sys
from pathlib import Path

import torch

from potstill import manifest
from potstill.errors import ModelError
from potstill.evaluation.config import EvaluationConfig
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.models.export import STUDENT, export_student
from potstill.models.loading import load_model, load_tokenizer
from potstill.models.tokenizers import vocabulary_size
from potstill.recipes.objectives import make_objectives
from potstill.recipes.read import recipe_from_values
from potstill.recipes.request import is_checkpoint
from potstill.recipes.words import printable
from potstill.run_folder import RECIPE, RunFolder
from potstill.training.checkpoint import load_checkpoint
from potstill.training.distiller import Distiller
from potstill.training.state import restore_weights


def export_checkpoint(checkpoint: Path, output: Path, *, merge: bool = True, dtype: str | None = None) -> list[Path]:
    """Commits `output/student` (and `output/adapter`) as the run was at `checkpoint`, RUN/checkpoints/step-N; returns the folders.

    `dtype`: float32, bfloat16 or float16; by default as trained.
    Raises ModelError for a checkpoint that is torn, IncompatibleError where the run's student has been changed since.
    """
    run = RunFolder.read(checkpoint.absolute().parent.parent)
    if problems := manifest.verify_folder(checkpoint):
        raise ModelError(f"{checkpoint}: this checkpoint is torn ({problems[0]}); choose another")
    recipe = recipe_from_values(run.read_recipe(), str(run.path / RECIPE))
    tokenizer = load_tokenizer(recipe.student)
    size = vocabulary_size(tokenizer)
    model = load_model(recipe.student, precision=recipe.training.precision, trainable=True, seed=recipe.run.seed)
    student = CausalLM(model, size)
    restore_weights(Distiller(student, make_objectives(recipe, size, num_steps=1)), load_checkpoint(checkpoint).tensors["weights"])
    chosen = None if dtype is None else getattr(torch, dtype)
    return export_student(student.eval(), tokenizer, output.absolute(), merge=merge, dtype=chosen)


def with_students(config: EvaluationConfig) -> EvaluationConfig:
    """The same request with every checkpoint's student in place of the checkpoint, written to RUN/evaluation/step-N where it is not yet."""
    models = {name: [_student(model) for model in seeds] for name, seeds in config.models.items()}
    teacher = None if config.teacher is None else _student(config.teacher)
    return config.model_copy(update={"models": models, "teacher": teacher})


def _student(model: LoadingConfig) -> LoadingConfig:
    path = Path(model.path).expanduser()
    if not is_checkpoint(path):
        return model
    place = path.absolute().parent.parent / "evaluation" / path.name
    if not (place / STUDENT).is_dir():
        sys.stderr.write(printable(f"{path}: its student is written to {place / STUDENT}") + "\n")
        export_checkpoint(path, place)
    return model.model_copy(update={"path": str(place / STUDENT)})
