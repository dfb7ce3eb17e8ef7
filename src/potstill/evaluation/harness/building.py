"""From a request to questions of the harness that only need a model: definitions found, rows read, every question rendered once.

Whatever is wrong with the task or the rows shows here, before any weights are read.
"""

import inspect
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from jinja2 import UndefinedError

from potstill import storage
from potstill.data.sources import cache_alone_without_network
from potstill.errors import ConfigError, DataError, UsageError
from potstill.evaluation.harness.catalogue import Catalogue, Definition, find
from potstill.evaluation.harness.quiet import quietly
from potstill.evaluation.harness.rows import OwnRows, splits_of
from potstill.evaluation.harness_config import HarnessTaskConfig

_SEED = 1234
"""By which the harness draws examples, as its own command line does."""
_LENGTHS, _LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"), 256
"""The keys by which a task limits an answer, the first that it has, and the harness's own limit."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_COLUMN = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Questions:
    """Tasks of the harness, each rendered: `tasks` by name, and the group above them if one was asked.

    `loaded` is what the harness's own evaluation takes. `identity` is the tasks' meaning and the questions' content.
    """

    name: str
    loaded: Mapping[str, Any]
    limit: int | None
    size: int
    identity: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def tasks(self) -> Mapping[str, Any]:
        return self.loaded["tasks"]

    @property
    def metrics(self) -> list[str]:
        """How a record names the metrics of the tasks, each with its filter."""
        return list(dict.fromkeys(
            metric_name(metric, one.name) for task in self.tasks.values() for metric in task.aggregation() for one in task._filters
        ))  # fmt: skip

    @property
    def longest_answer(self) -> int:
        """Tokens that a model may write at most, 0 where it writes nothing."""
        writing = [task for task in self.tasks.values() if task.OUTPUT_TYPE == "generate_until"]
        said = [task.get_config("generation_kwargs") or {} for task in writing]
        return max((next((one[key] for key in _LENGTHS if one.get(key) is not None), _LENGTH) for one in said), default=0)

    @property
    def group(self) -> Any | None:
        return self.loaded["groups"].get(self.name)


def metric_name(metric: str, filter_name: str) -> str:
    """`acc` where the harness writes acc,none, and exact_match_strict-match where it writes exact_match,strict-match."""
    return (metric if filter_name in ("none", "") else f"{metric}_{filter_name}").replace("/", "-")


def build_questions(config: HarnessTaskConfig) -> Questions:
    """Raises UsageError and its kinds, in one line, for a task that cannot be asked: unknown, unsafe, or with rows it cannot read."""
    catalogue = find(config.task, config.file)
    for definition in catalogue.tasks.values():
        _refuse_unsafe(definition)
    with quietly(), tempfile.TemporaryDirectory() as folder:
        own = None if config.data is None else OwnRows(config.task, config.data)
        loaded = _load(config, catalogue, own, Path(folder))
        digest, size, questions = xxhash.xxh3_128(), 0, 0
        for name, task in loaded["tasks"].items():
            _set_examples(task, config.few_shot)
            try:
                task.build_all_requests(limit=config.limit)
            except Exception as error:
                raise _explained(error, config, catalogue.tasks[name], own) from error
            if own is not None:
                _refuse_unanswerable(task, catalogue.tasks[name], own)
            for instance in task.instances:
                digest.update(json.dumps([instance.arguments, instance.doc], default=_plain, sort_keys=True).encode())
            size += sum(instance.repeats for instance in task.instances)
            questions += len({instance.doc_id for instance in task.instances})
    tasks = {name: _meaning(task, own is not None) for name, task in loaded["tasks"].items()}
    group = loaded["groups"].get(catalogue.name)
    identity = {
        "lm_eval": version("lm_eval"), "tasks": tasks, "group": None if group is None else json.loads(_json(group.to_dict())),
        "questions": digest.hexdigest(), "limit": config.limit,
    }  # fmt: skip
    shots = sorted({task.get_config("num_fewshot") or 0 for task in loaded["tasks"].values()})
    facts = {
        "harness": f"lm_eval {version('lm_eval')}", "task": catalogue.name, "questions": questions,
        "few_shot": shots[0] if len(shots) == 1 else shots, "rows": _source(config, catalogue),
    } | ({"subtasks": len(tasks)} if group is not None else {})  # fmt: skip
    found = Questions(catalogue.name, loaded, config.limit, size, identity, facts)
    if config.metric is not None and metric_name(*config.metric.partition(",")[::2]) not in found.metrics:
        raise ConfigError(f"{config.task}: metric: {config.metric!r} is none of it, which has {', '.join(found.metrics)}")
    return found


def _load(config: HarnessTaskConfig, catalogue: Catalogue, own: OwnRows | None, folder: Path) -> Mapping[str, Any]:
    """The harness's own objects, from files of ours that include each definition and say where its rows are."""
    from lm_eval.tasks import TaskManager

    files = folder / "tasks"
    storage.make_folder(files)
    for number, definition in enumerate([*catalogue.groups.values(), *catalogue.tasks.values()]):
        said: dict[str, Any] = {"include": str(definition.path.resolve())}
        if definition.name in catalogue.tasks and not definition.is_class:
            splits = splits_of(definition, config.few_shot)
            if own is not None:
                said |= own.stand_in(definition, splits, folder / "rows", several=len(catalogue.tasks) > 1)
        elif own is not None and definition.is_class:
            raise UsageError(f"{config.task}: is written in Python and reads data of its own; leave data out")
        storage.write_json(files / f"{number:05d}.yaml", said)
    manager = TaskManager(include_path=[files], include_defaults=False)
    try:
        with cache_alone_without_network():
            return manager.load([catalogue.name])
    except UsageError:
        raise
    except Exception as error:
        raise _explained(error, config, next(iter(catalogue.tasks.values())), own) from error


def _set_examples(task: Any, few_shot: int | None) -> None:
    """As many solved examples as asked, drawn by the harness's own seed; a task that says nothing gets none."""
    if few_shot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=few_shot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


# ---------------------------------------------------------------- what is refused


def _refuse_unsafe(definition: Definition) -> None:
    values = definition.values
    if values.get("unsafe_code"):
        raise UsageError(f"{definition.name}: runs the code that a model writes, which Potstill does not")
    if values.get("doc_to_image") or values.get("doc_to_audio"):
        raise UsageError(f"{definition.name}: asks about images or sound, and these models read text")
    if values.get("process_results") is None and not definition.is_class:
        from lm_eval.api import metrics as _  # noqa: F401  registers the harness's metrics
        from lm_eval.api.registry import metric_registry

        for metric in values.get("metric_list") or []:
            name = metric.get("metric")
            is_file = isinstance(name, str) and name.startswith("/")  # a function beside the task file
            if metric.get("hf_evaluate") or (isinstance(name, str) and not is_file and name not in metric_registry):
                raise UsageError(f"{definition.name}: its metric {name!r} would be code downloaded from the hub; such tasks are not run")


def _refuse_unanswerable(task: Any, definition: Definition, own: OwnRows) -> None:
    """Where the user's rows lack a column that a task names alone, the harness would take the name itself for the answer."""
    columns = task.features
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        named = definition.values.get(key)
        if isinstance(named, str) and _COLUMN.fullmatch(named) and named not in columns:
            raise _missing(definition, own, named)
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return
    for number, doc in task.doc_iterator():
        gold, choices = (task.doc_to_text if task.multiple_input else task.doc_to_target)(doc), task.doc_to_choice(doc)
        for one in gold if isinstance(gold, list) else [gold]:
            if not (one < len(choices) if isinstance(one, int) else one in choices):
                raise DataError(f"{_file(own)}: question {number + 1}: the right answer {one!r} is none of its {len(choices)} choices")


def _explained(error: Exception, config: HarnessTaskConfig, definition: Definition, own: OwnRows | None) -> UsageError:
    """What went wrong while the harness read a data set or rendered a question, in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    if own is not None and isinstance(error, KeyError | UndefinedError):
        quoted = re.findall(r"'([^']*)'", first)
        return _missing(definition, own, quoted[-1] if quoted else first, nested="has no attribute" in first)
    hub = definition.values.get("dataset_path")
    if own is None and isinstance(error, OSError) and config.file is None:
        return DataError(
            f"{config.task}: its data set {hub} is not on this machine, and the hub does not give it ({type(error).__name__}: {first}); "
            f"give the rows yourself, in its columns: --task {config.task}=rows.jsonl"
        )
    if "fewshot samples" in first or "Sample larger than population" in first:
        return UsageError(f"{config.task}: few_shot: there are fewer solved examples than are asked for")
    where = f"{_file(own)}: {definition.name} cannot be asked from these rows" if own is not None else f"{config.task}: cannot be asked"
    return DataError(f"{where} ({type(error).__name__}: {first}){_schema(definition) if own is not None else ''}")


def _missing(definition: Definition, own: OwnRows, column: str, *, nested: bool = False) -> DataError:
    what = f"{column!r} inside one of its columns" if nested else f"the column {column!r}"
    return DataError(f"{_file(own)}: {definition.name} needs {what}, and the rows have {', '.join(own.columns())}{_schema(definition)}")


def _schema(definition: Definition) -> str:
    hub = definition.values.get("dataset_path")
    return f"; the columns are those of {hub} on the hub" if hub not in (None, "json", "parquet", "csv") else ""


def _file(own: OwnRows | None) -> str:
    return "" if own is None else own.data if isinstance(own.data, str) else ", ".join(own.data.values())


def _source(config: HarnessTaskConfig, catalogue: Catalogue) -> str:
    if config.data is not None:
        return config.data if isinstance(config.data, str) else ", ".join(config.data.values())
    return ", ".join(dict.fromkeys(str(task.values.get("dataset_path")) for task in catalogue.tasks.values()))


# ---------------------------------------------------------------- what a task means


def _meaning(task: Any, has_own_rows: bool) -> dict[str, Any]:
    """A task's settings as JSON values, without what says only where something lies."""
    values = dict(task.dump_config())
    values["metadata"] = {key: value for key, value in (values.get("metadata") or {}).items() if key != "config_source"}
    if has_own_rows:
        for key in ("dataset_path", "dataset_name"):
            values.pop(key, None)
    values.pop("dataset_kwargs", None)
    return json.loads(_json(values))


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain, sort_keys=True)


def _plain(value: Any) -> Any:
    """Functions as their text; numbers of numpy as numbers; anything else as it is written, without its address."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    if callable(value):
        try:
            return inspect.getsource(value)
        except (TypeError, OSError):
            pass
    return _ADDRESS.sub("", repr(value))
