"""What is asked without a recipe: a model to measure, a run to export. Checked as strictly as a recipe, and as free of torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.errors import RunFolderError, UsageError
from potstill.evaluation.config import EvaluationConfig, refuse_output
from potstill.models.config import LoadingConfig
from potstill.recipes.mistakes import build
from potstill.recipes.precheck import check_data, check_model
from potstill.recipes.read import apply_override, recipe_from_values
from potstill.recipes.schema import Recipe
from potstill.recipes.text import Document
from potstill.run_folder import RECIPE, RunFolder

_OF_THE_BASE = {"path", "revision", "quantization", "attention", "trust_remote_code", "eos_token", "chat_template"}


def model_values(name: str) -> dict[str, Any]:
    """How to load what `name` stands for: a run folder is its exported student, an adapter folder its base with the adapter."""
    folder = Path(name).expanduser()
    if (folder / RECIPE).is_file():
        folder = folder / "student"
        if not folder.is_dir():
            raise UsageError(f"{name}: this run has not exported its student yet; the command that began it goes on from where it was")
        name = str(folder)
    if (folder / "adapter_config.json").is_file():
        import json

        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise UsageError(f"{name}: its adapter_config.json names no base model; name the base model and say --set model.adapter={name}")
        return {"path": base, "adapter": name}
    return {"path": name}


def evaluation_request(
    model: str, data: str, format: str, teacher: str | None, output: str | None, settings: Sequence[str]
) -> tuple[EvaluationConfig, str | None]:
    """The request of `potstill evaluate`, and where its record goes. Raises ConfigError, ModelError or DataError for what cannot be."""
    values: dict[str, Any] = {"model": model_values(model), "data": {"train": data, "format": format}}
    if teacher is not None:
        values["teacher"] = model_values(teacher)
    document = Document(values, {(): "command line"})
    for setting in settings:
        apply_override(document, setting)
    config = build(EvaluationConfig, document, "command line")
    refuse_output(output)
    check_model("model", config.model)
    if config.teacher is not None:
        check_model("teacher", config.teacher)
    check_data(config.data)
    if output is None and (Path(model).expanduser() / RECIPE).is_file():
        # One text may be measured alone and against several teachers; no record takes another's place.
        names = [re.sub(r"(\.(jsonl|json|parquet|csv|txt))?(\.gz)?$", "", Path(data).name), *([Path(teacher).name] if teacher else [])]
        output = str(Path(model).expanduser() / "evaluation" / f"{'-against-'.join(names)}.json")
    return config, output


def export_request(run: str, dtype: str | None) -> LoadingConfig:
    """How the student of a finished run is loaded to be written once more. Raises RunFolderError or UsageError."""
    folder = RunFolder.read(run)
    if folder.status != "finished":
        raise RunFolderError(f"{run}: this run is not finished; the command that began it goes on from where it was")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype}: must be float32, bfloat16 or float16")
    recipe: Recipe = recipe_from_values(folder.read_recipe(), f"{run}/{RECIPE}")
    student = recipe.student
    values: dict[str, Any] = {"path": str(folder.student), "dtype": dtype}
    if (folder.adapter / "adapter_config.json").is_file():
        # The adapter on its base says more than the merged weights: merged, they were rounded once.
        kept = student.model_dump(include=_OF_THE_BASE)
        values = kept | {"adapter": str(folder.adapter), "dtype": dtype or student.dtype}
    config = LoadingConfig.model_validate(values)
    check_model("student", config)
    return config
