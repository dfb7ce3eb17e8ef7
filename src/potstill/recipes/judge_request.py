"""What `potstill judge` is asked, put together from the command line and a plan, and checked before any model is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.errors import DataError, UsageError
from potstill.evaluation.judging.settings import ContestantConfig, JudgingConfig
from potstill.evaluation.task_config import name_of
from potstill.recipes.mistakes import build
from potstill.recipes.precheck import check_model, is_local
from potstill.recipes.read import apply_override, read_text
from potstill.recipes.request import model_values
from potstill.recipes.text import Document, parse
from potstill.run_folder import RECIPE
from potstill.serving.service import Service, read_key

_ANSWER_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def judging_request(
    first: str | None, second: str | None = None, *, prompts: str | None = None, format: str | None = None, style: str | None = None,
    judge: str | None = None, judge_model: str | None = None, api_key_env: str | None = None, annotations: str | None = None,
    folder: str | None = None, plan: str | None = None, settings: Sequence[str] = (),
) -> tuple[JudgingConfig, Path | None]:  # fmt: skip
    """The request, and where a run folder keeps the record. What is said on the command line stands over the plan.

    Raises ConfigError, ModelError or DataError for what cannot be.
    """
    document = _plan(plan)
    values = document.values
    for key, said in (("first", first), ("second", second)):
        said = values.get(key) if said is None else said
        if isinstance(said, str):
            values[key] = contestant_values(said)
    for key, said in (("prompts", prompts), ("format", format), ("style", style), ("folder", folder),
                      ("annotations", annotations)):  # fmt: skip
        if said is not None:
            values[key] = said
    asked = {"url": judge, "model": judge_model, "api_key_env": api_key_env}
    if any(said is not None for said in asked.values()):
        values["judge"] = (values.get("judge") or {}) | {key: said for key, said in asked.items() if said is not None}
    _fill(values)
    for setting in settings:
        apply_override(document, setting)
    if not values.get("first"):
        raise UsageError("nobody to judge: name two models, or files of their answers")
    config = build(JudgingConfig, document, plan or "command line")
    _check(config)
    return config, _own_place(first, config)


def contestant_values(said: str) -> dict[str, Any]:
    """What PATH or NAME=PATH stands for: a file of answers, a run folder, a model's folder or its name on the hub."""
    name, equals, path = said.partition("=")
    if not equals or Path(said).exists() or "/" in name:
        name, path = "", said
    file = Path(path).expanduser()
    if file.is_file() or path.endswith(_ANSWER_FILES):
        return {"answers": path} | ({"name": name} if name else {})
    return {"name": name or name_of(path.rstrip("/")), "model": model_values(path)}


def _plan(plan: str | None) -> Document:
    if plan is None:
        return Document({}, {(): "command line"})
    path = Path(plan).expanduser()
    if not path.is_file():
        raise UsageError(f"{plan}: no such file; a plan is a YAML file with the keys of docs/judge.md")
    document = parse(read_text(path, plan), plan)
    if not isinstance(document.values, dict):
        raise UsageError(f"{plan}: a plan is a mapping with keys such as first, second, prompts and judge")
    return document


def _fill(values: dict[str, Any]) -> None:
    """Prompts that stand beside the answers themselves, and a folder named after the contestants."""
    contestants = [values[key] for key in ("first", "second") if isinstance(values.get(key), dict)]
    if not values.get("prompts"):
        answers = [one["answers"] for one in contestants if isinstance(one.get("answers"), str)]
        if not answers:
            raise UsageError("no prompts: name AlpacaEval's instructions or MT-Bench's questions: --prompts FILE")
        values["prompts"] = answers[0]
    if not values.get("folder"):
        names = [str(one.get("name") or name_of(str(one.get("answers") or "contestant"))) for one in contestants]
        values["folder"] = f"judged/{'-and-'.join(names)}"


def _check(config: JudgingConfig) -> None:
    for key, one in (("first", config.first), ("second", config.second)):
        if one is not None:
            _check_contestant(key, one)
    if is_local(config.prompts) and not Path(config.prompts).expanduser().is_file():
        raise DataError(f"prompts: {config.prompts}: no such file")
    if config.annotations is not None and not Path(config.annotations).expanduser().is_file():
        raise DataError(f"annotations: {config.annotations}: no such file")
    if config.second is not None and config.first.name is not None and config.first.name == config.second.name:
        raise UsageError(f"{config.first.name}: named twice; give one of them a name of its own, as in other=PATH")
    if config.judge is not None:
        read_key(Service("judge", config.judge.url, api_key_env=config.judge.api_key_env, api_key_file=config.judge.api_key_file))


def _check_contestant(key: str, one: ContestantConfig) -> None:
    if one.model is not None:
        check_model(f"{key}.model", one.model)
    elif one.answers is not None and not Path(one.answers).expanduser().is_file():
        raise DataError(f"{key}.answers: {one.answers}: no such file")


def _own_place(first: str | None, config: JudgingConfig) -> Path | None:
    """A run folder that comes first keeps the record too."""
    path = Path((first or "").rpartition("=")[2]).expanduser() if first else None
    if path is None or not (path / RECIPE).is_file():
        return None
    beside = ""
    if config.second is not None:
        beside = f"-beside-{config.second.name or name_of(config.second.answers or '')}"
    return path / "evaluation" / f"{config.style}-{name_of(config.prompts)}{beside}.json"
