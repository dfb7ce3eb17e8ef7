"""What is asked without a recipe: a model to measure, a run to export. Checked as strictly as a recipe, and as free of torch."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.errors import RunFolderError, UsageError
from potstill.evaluation.config import EvaluationConfig, refuse_output
from potstill.models.config import LoadingConfig
from potstill.recipes.mistakes import build, show
from potstill.recipes.precheck import check_model, check_tasks
from potstill.recipes.read import apply_override, read_text, recipe_from_values
from potstill.recipes.schema import Recipe
from potstill.recipes.text import Document, parse
from potstill.run_folder import RECIPE, RunFolder
from potstill.storage import MANIFEST

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


def is_checkpoint(path: Path) -> bool:
    """Whether this is RUN/checkpoints/step-N of a run: trained weights that are no model by themselves."""
    return path.name.startswith("step-") and (path / MANIFEST).is_file() and (path.absolute().parent.parent / RECIPE).is_file()


def evaluation_request(
    models: Sequence[str], data: Sequence[str] = (), format: str | None = None, teacher: str | None = None, output: str | None = None,
    settings: Sequence[str] = (), *, plan: str | None = None, tasks: Sequence[str] = (), baseline: str | None = None,
) -> tuple[EvaluationConfig, str | None]:  # fmt: skip
    """The request of `potstill evaluate`, and where its record goes. Raises ConfigError, ModelError or DataError for what cannot be.

    `models` are folders, names on the hub, run folders, or NAME=A,B for the seeds of one row; `data` texts, `tasks` names of the harness
    (NAME or NAME=FILE, the user's own data), `plan` a YAML file with the rest, over which these stand.
    """
    document = _plan_document(plan)
    values = document.values
    named = _rows(models)
    if named:
        values["models"] = {name: [model_values(one) for one in paths] for name, paths in named.items()}
    if teacher is not None:
        values["teacher"] = model_values(teacher)
    if baseline is not None:
        values["baseline"] = baseline
    asked: list[Any] = [{"kind": "text", "data": {"train": one, "format": format or "instruct"}} for one in data]
    asked += [_harness_values(one) for one in tasks]
    if asked:
        values["tasks"] = [*(values.get("tasks") or []), *asked]
    for setting in settings:
        apply_override(document, _of_the_only_one(setting, values))
    if not values.get("tasks"):
        raise UsageError("nothing to measure: name a text (--data rows.jsonl), a task (--task hellaswag) or a plan (--plan plan.yaml)")
    if not values.get("models"):
        raise UsageError("no model to measure: name a folder, a name on the hub or a run folder")
    config = build(EvaluationConfig, document, plan or "command line")
    refuse_output(output)
    for name, seeds in config.models.items():
        for place, model in enumerate(seeds):
            if not is_checkpoint(Path(model.path).expanduser()):
                check_model(f"models.{name}[{place}]" if len(named) != 1 or len(seeds) > 1 else "model", model)
    if config.teacher is not None and not is_checkpoint(Path(config.teacher.path).expanduser()):
        check_model("teacher", config.teacher)
    check_tasks(config)
    return config, output if output is not None else _own_place(models, config, teacher)


def _plan_document(plan: str | None) -> Document:
    if plan is None:
        return Document({}, {(): "command line"})
    path = Path(plan).expanduser()
    if not path.is_file():
        raise UsageError(f"{plan}: no such file; a plan is a YAML file with the keys of an evaluation (docs/evaluation.md)")
    document = parse(read_text(path, plan), plan)
    if not isinstance(document.values, dict):
        raise UsageError(f"{plan}: a plan is a mapping with keys such as tasks, models and teacher")
    if not isinstance(document.values.get("tasks") or [], list):
        found = show(document.values["tasks"])
        raise UsageError(f"{document.place(('tasks',)) or plan}: tasks: a list of tasks, each with a kind; found {found}")
    models = document.values.get("models") or {}
    if not isinstance(models, dict):
        raise UsageError(f"{document.place(('models',)) or plan}: models: rows by name, as in {{student: runs/kd}}; found {show(models)}")
    for name, seeds in models.items():
        said = seeds if isinstance(seeds, list) else [seeds]
        document.values["models"][name] = [model_values(one) if isinstance(one, str) else one for one in said]
    if isinstance(document.values.get("teacher"), str):
        document.values["teacher"] = model_values(document.values["teacher"])
    return document


def _rows(models: Sequence[str]) -> dict[str, list[str]]:
    """Rows of the table by name: NAME=A,B as it says, else by the last part of the path that tells them apart."""
    rows: dict[str, list[str]] = {}
    plain = [model for model in models if not _ROW.fullmatch(model) or Path(model).exists()]
    short = {model: Path(model).name or model for model in plain}
    for model in models:
        if model in short:
            alike = [other for other in plain if short[other] == short[model]]
            name, paths = (short[model] if len(alike) == 1 else model), [model]
        else:
            found = _ROW.fullmatch(model)
            assert found is not None
            name, paths = found[1], found[2].split(",")
        if name in rows:
            raise UsageError(f"{name}: named twice; give one of them a name of its own, as in other={paths[0]}")
        rows[name] = paths
    return rows


_ROW = re.compile(r"([A-Za-z0-9][A-Za-z0-9 ._-]*)=(.+)")


def _harness_values(said: str) -> dict[str, Any]:
    name, _, file = said.partition("=")
    return {"kind": "harness", "task": name} | ({"data": file} if file else {})


def _of_the_only_one(setting: str, values: Mapping[str, Any]) -> str:
    """`model.` and `data.` mean the only model and the only task where there is one of them."""
    if setting.startswith("model.") and len(values.get("models") or {}) == 1:
        (name,) = values["models"]
        return f"models.{name}.0.{setting.removeprefix('model.')}"
    if setting.startswith("data.") and len(values.get("tasks") or []) == 1:
        return f"tasks.0.{setting}"
    return setting


def _own_place(models: Sequence[str], config: EvaluationConfig, teacher: str | None) -> str | None:
    """A run folder that is measured first keeps the record; one text may be measured alone and against several teachers, and no record
    takes another's place."""
    if not models or not (Path(models[0]).expanduser() / RECIPE).is_file():
        return None
    names = [task.label for task in config.tasks]
    parts = ["-and-".join(names[:3]) + ("-and-more" if len(names) > 3 else "")]
    parts += [f"beside-{Path(name).name}" for name in list(config.models)[1:3]]
    parts += [f"against-{Path(teacher).name}"] if teacher else []
    return str(Path(models[0]).expanduser() / "evaluation" / f"{'-'.join(parts)}.json")


def export_request(run: str, dtype: str | None) -> LoadingConfig | None:
    """How the student of a finished run is loaded to be written once more; None for a checkpoint, which is no model by itself.

    Raises RunFolderError or UsageError.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype}: must be float32, bfloat16 or float16")
    if is_checkpoint(Path(run).expanduser()):
        return None
    folder = RunFolder.read(run)
    if folder.status != "finished":
        raise RunFolderError(
            f"{run}: this run is not finished; the command that began it goes on from where it was, and {run}/checkpoints/step-N is "
            "exported as it is"
        )
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
