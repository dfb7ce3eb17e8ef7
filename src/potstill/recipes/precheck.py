"""What can be refused before torch is imported: folders and files that are not there, and local data that cannot be read.

It looks only at what is on this machine; names on the hub are left to those who load them.
"""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from potstill.data.config import DataConfig, MixtureItem
from potstill.errors import ConfigError, ModelError, UsageError
from potstill.evaluation.config import AnyTask, MeasuringConfig
from potstill.evaluation.harness_config import HarnessTaskConfig
from potstill.evaluation.questions_config import QuestionsTaskConfig
from potstill.models.config import LoadingConfig
from potstill.recipes.fitting import Single, members
from potstill.recipes.schema import Recipe
from potstill.teachers.config import CacheTeacherConfig, LocalTeacherConfig, ServerTeacherConfig

# Files larger than this are read once, when they are prepared: a second reading would cost more than an early answer is worth.
_READ_TWICE_BYTES = 4 * 2**20
# What makes a folder a cache.
_CACHE = "cache.json"


def precheck(recipe: Recipe) -> None:
    """Raises ModelError or DataError, naming the key and the remedy, for the first thing that is not there."""
    check_model("student", recipe.student)
    if recipe.uses_teacher:
        for key, member in members(recipe.teacher):
            check_teacher(key, member)
    check_trackers(recipe)
    check_data(recipe.data)


def precheck_capture(recipe: Recipe, name: str, shard: str | None, engine: str | None) -> tuple[int, int]:
    """The share that `--shard I/N` names, as (index from 0, number of shares). Raises UsageError for what can be refused without torch."""
    if recipe.capture is None:
        raise ConfigError(f"{name}: capture: missing; say where the answers go, as in capture='{{path: caches/teacher, k: 64}}'")
    if isinstance(recipe.teacher, CacheTeacherConfig):
        raise ConfigError(
            f"{name}: teacher.kind: a cache holds answers already; name the teacher itself to capture from it, or put caches together with "
            "potstill cache merge OUT IN..."
        )
    if not recipe.objective.asks_teacher:
        raise ConfigError(f"{name}: objective.kd_ratio: the teacher is never asked, so nothing would be captured; leave it out")
    if engine not in (None, "ray"):
        raise UsageError(f"--engine {engine}: there is ray; without it the ranks of torchrun, or --shard I/N on several machines")
    if engine == "ray" and find_spec("ray") is None:
        raise UsageError("--engine ray: it is not installed: pip install 'potstill[ray]'")
    index, _, number = (shard or "1/1").partition("/")
    if not (index.isdigit() and number.isdigit() and 1 <= int(index) <= int(number)):
        raise UsageError(f"--shard {shard}: say which of how many, counted from 1, as in --shard 2/8")
    precheck(recipe)
    return int(index) - 1, int(number)


def check_teacher(key: str, teacher: Single) -> None:
    """Raises ModelError or ConfigError where a teacher, as far as it lies on this machine, is not there. A server is not asked."""
    if isinstance(teacher, LocalTeacherConfig):
        check_model(key, teacher)
    elif isinstance(teacher, CacheTeacherConfig):
        _check_cache(key, teacher.path)
        if teacher.model is not None:
            check_model(f"{key}.model", teacher.model)
    else:
        _check_server(key, teacher)


def _check_cache(key: str, path: str) -> None:
    folder = Path(path.removeprefix("file://")).expanduser()
    if "://" in str(path).removeprefix("file://") or (folder / _CACHE).is_file():
        return
    what = "no cache there" if folder.is_dir() else "a file, where a cache is a folder" if folder.exists() else "no such folder"
    raise ModelError(
        f"{key}.path: {path}: {what} ({_CACHE} is missing); potstill capture RECIPE makes a cache where capture.path says, from a recipe "
        "that names the teacher itself"
    )


def _check_server(key: str, teacher: ServerTeacherConfig) -> None:
    if teacher.api_key_env is not None and not os.environ.get(teacher.api_key_env):
        raise ConfigError(
            f"{key}.api_key_env: the variable {teacher.api_key_env} is not set; set it to the server's key, or leave this out"
        )
    if teacher.api_key_file is not None and not Path(teacher.api_key_file).expanduser().is_file():
        raise ConfigError(f"{key}.api_key_file: {teacher.api_key_file}: no such file; it holds the server's key, alone on one line")
    if teacher.tokenizer is not None and is_local(teacher.tokenizer) and not Path(teacher.tokenizer).expanduser().is_dir():
        raise ModelError(f"{key}.tokenizer: {teacher.tokenizer}: no such folder; name the folder or the hub's name of the served model")


def check_trackers(recipe: Recipe) -> None:
    """Raises ConfigError where a tracker's package is not installed."""
    for tracker in recipe.run.trackers:
        if find_spec(tracker) is None:
            raise ConfigError(
                f"run.trackers: {tracker} is not installed: pip install 'potstill[{tracker}]', or leave it out: run.trackers=[]; "
                "the run folder keeps every metric either way"
            )


def is_local(path: str) -> bool:
    """Whether `path` can only be a folder on this machine, or is one."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).expanduser().exists()


def check_model(side: str, config: LoadingConfig) -> None:
    """Raises ModelError where a local model or adapter of `side` is missing."""
    folder = Path(config.path).expanduser()
    if is_local(config.path) and not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise ModelError(f"{side}.path: {config.path}: {what}; a model is a folder with config.json and safetensors, or a name on the hub")
    if folder.is_dir() and not (folder / "config.json").is_file() and not _is_adapter(folder):
        hint = f"; this is a run folder, its model is {config.path.rstrip('/')}/student" if (folder / "student").is_dir() else ""
        hint = hint or ("; this is a cache of recorded answers, and here the model itself is asked" if (folder / _CACHE).is_file() else "")
        raise ModelError(f"{side}.path: {config.path}: no config.json there, so it is not a model{hint}")
    if config.adapter is not None and is_local(config.adapter) and not _is_adapter(Path(config.adapter).expanduser()):
        raise ModelError(
            f"{side}.adapter: {config.adapter}: no adapter there (no adapter_config.json); train it first with potstill finetune, "
            f"or leave it out: {side}.adapter=null"
        )


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def check_data(config: DataConfig) -> None:
    """Reads small local files once, so that a malformed line or a missing column is said at once. Raises DataError."""
    from potstill.data.formats import Reading, check_columns
    from potstill.data.lines import Rejects
    from potstill.data.sources import SUFFIXES, read_source

    rejects = Rejects(config.bad_lines_allowed)
    for item in _sources(config):
        path = Path(item.path).expanduser()
        if path.is_file() and path.stat().st_size > _READ_TWICE_BYTES:
            continue
        if not path.exists() and not is_local(item.path) and not item.path.endswith(SUFFIXES):
            continue  # a name on the hub
        rows = read_source(item, rejects, config.text_rows)
        columns = config.columns if item.columns is None else item.columns
        check_columns(rows, Reading(item.format or config.format, columns, config.instruct_prompt), item.path, rejects)


def check_tasks(config: MeasuringConfig) -> None:
    """Raises DataError, ConfigError or UsageError for the first task whose files, checker or package are not there."""
    for task in config.tasks:
        _check_task(task)


def _check_task(task: AnyTask) -> None:
    if isinstance(task, HarnessTaskConfig):
        _check_harness(task)
        return
    check_data(task.data)
    if isinstance(task, QuestionsTaskConfig):
        from potstill.rollouts.checkers import make_checker

        make_checker(task.checker, f"{task.label}: checker")


def _check_harness(task: HarnessTaskConfig) -> None:
    from potstill.evaluation.harness.catalogue import harness_folder
    from potstill.evaluation.harness.rows import SUBSET, require_file

    harness_folder()
    if task.file is not None and not task.file.is_file():
        raise UsageError(f"{task.task}: no such file; a task is a name of lm-evaluation-harness or a YAML file that describes one")
    files = [task.data] if isinstance(task.data, str) else list((task.data or {}).values())
    for file in files:
        if SUBSET not in file:
            require_file(file, task.task)


def _sources(config: DataConfig) -> Iterable[MixtureItem]:
    yield from config.sources
    if config.held_out is not None:
        yield config.held_out
