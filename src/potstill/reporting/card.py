"""The model card of a run's student: README.md as Hugging Face reads it, from the run folder alone.

It holds what the run decided and found, and nothing that hangs on when, where or in how many sessions it was done: the same run has
the same card, resumed or not. Paths of the machine are shown by their last part; no license is claimed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from potstill.environment import redact, redact_text
from potstill.reporting.markdown import escaped, results_markdown
from potstill.reporting.pipeline import in_words
from potstill.reporting.summary import RunSummary, summarise
from potstill.reporting.wording import number

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?\Z")
_FILE = re.compile(r"\.(?:jsonl?|parquet|csv|txt|gz|zst|arrow)\Z", re.IGNORECASE)
# A path from a root, from home or from here, in the middle of a sentence.
_PATH = re.compile(r"(?<![\w/:.<])(?:~|\.{1,2})?/(?:[^\s/'\"`,;:()<>]+/)*([^\s/'\"`,;:()<>]+)/?")
_OF_A_RUN = ("student", "adapter")
_PACKAGES = ("potstill", "torch", "transformers", "peft", "datasets")
_ADDRESSES = re.compile(r"\.(?:url|model_url)\Z")
_LOSSES = {"loss": "total", "loss/ce": "cross-entropy", "loss/kd": "divergence from the teacher"}
_SEEN = {
    "eval_top1_agreement": "top-1 agreement with the teacher", "eval_entropy": "entropy", "eval_teacher_entropy": "the teacher's entropy",
}  # fmt: skip


def model_cards(run: Path | str, finished: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The cards of RUN/student and RUN/adapter, by the names of the folders.

    `finished` is what the run will state of itself at its end, for one that is about to. Raises RunFolderError where there is no run.
    """
    summary = summarise(run)
    summary = replace(summary, finished=summary.finished or dict(finished or {}))
    return {folder: _card(summary, folder) for folder in _OF_A_RUN}


def _card(summary: RunSummary, folder: str) -> str:
    recipe = {key: _shown(value) for key, value in redact(dict(summary.recipe)).items() if not _ADDRESSES.search(key)}
    is_adapter = folder == "adapter" or (recipe.get("run.merge_adapter") is False and "student.lora.rank" in recipe)
    front = yaml.safe_dump(_metadata(summary, is_adapter), sort_keys=False, allow_unicode=False)
    name = f"{summary.path.name}/{folder}" if folder == "adapter" else summary.path.name
    parts = [
        f"# {escaped(redact_text(name))}", _what(recipe), "## How it was made", _bullets(in_words(recipe)), "## Training",
        _training(summary), "## Results", _results(summary), "## Use", _use(recipe, is_adapter), "## Limits", _limits(summary),
        "## Versions", _versions(summary),
    ]  # fmt: skip
    return f"---\n{front}---\n\n" + redact_text("\n\n".join(part for part in parts if part)) + "\n"


# ---------------------------------------------------------------- what is said of paths and names


def _is_local(text: str) -> bool:
    """Whether a name of a model or of data can only be, or is, something on this machine."""
    return "://" in text or text.startswith(("/", ".", "~")) or text.count("/") > 1 or bool(_FILE.search(text)) or Path(text).exists()


def _hub_name(value: Any) -> str | None:
    return value if isinstance(value, str) and _REPOSITORY.match(value) and not _is_local(value) else None


def _local(text: str) -> str:
    """The last part of a path; for a run's student also the run's."""
    parts = [part for part in text.split("/") if part not in ("", ".", "..", "~")]
    return "/".join(parts[-2:] if parts and parts[-1] in _OF_A_RUN else parts[-1:])


def _shown(value: Any) -> Any:
    """A value of the recipe without the folders of this machine."""
    if isinstance(value, str):
        return _local(value) if "/" in value and " " not in value and _is_local(value) else _without_paths(value)
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return value


def _without_paths(text: str) -> str:
    return _PATH.sub(lambda found: found[1], text)


# ---------------------------------------------------------------- its parts


def _metadata(summary: RunSummary, is_adapter: bool) -> dict[str, Any]:
    recipe = summary.recipe
    base = None if recipe.get("student.weights") == "random" else _hub_name(recipe.get("student.path"))
    found: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "text-generation"}
    if base is not None:
        found |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    if data := _hub_data(recipe.get("data.train")):
        found["datasets"] = data
    return found | {"tags": ["distillation", "potstill"] if _has_teacher(recipe) else ["fine-tuning", "potstill"]}


def _hub_data(train: Any) -> list[str]:
    listed = train if isinstance(train, list) else [train]
    names = [_hub_name(one.get("path") if isinstance(one, Mapping) else one) for one in listed]
    return list(dict.fromkeys(name for name in names if name is not None))


def _has_teacher(recipe: Mapping[str, Any]) -> bool:
    return any(key.startswith("teacher.") for key in recipe)


def _what(recipe: Mapping[str, Any]) -> str:
    student = escaped(str(recipe.get("student.path", "a model")))
    if not _has_teacher(recipe):
        return f"{student}, fine-tuned on text with Potstill."
    return f"{student}, which has learned from a teacher with Potstill."


def _bullets(lines: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {escaped(words)}" for name, words in lines.items() if words)


def _training(summary: RunSummary) -> str:
    """What was spent, without clocks, and where the losses ended."""
    get = summary.finished.get
    lines = {
        "steps": f"{get('steps'):,}" if isinstance(get("steps"), int) else "",
        "epochs": number(get("epochs")) if isinstance(get("epochs"), int | float) else "",
        "tokens read": f"{get('tokens'):,}" if isinstance(get("tokens"), int) else "",
        "tokens learned": f"{get('target_tokens'):,}" if isinstance(get("target_tokens"), int) else "",
        "parameters": _parameters(get("parameters"), get("trainable_parameters")),
        "seed": str(summary.recipe.get("run.seed", "")),
        "stopped early": f"yes; the weights are those of step {get('best_step'):,}" if get("stopped_early") and get("best_step") else "",
    }
    rows = [(words, _end(summary, name), _end(summary, f"eval_{name}")) for name, words in _LOSSES.items()]
    table = ["| nats a target, at the end | training | validation |", "|---|---:|---:|"]
    table += [f"| {words} | {number(train)} | {number(validation)} |" for words, train, validation in rows if train is not None]
    seen = {words: number(_end(summary, name)) for name, words in _SEEN.items() if name in summary.curves}
    return "\n\n".join(part for part in (_bullets(lines), "\n".join(table) if len(table) > 2 else "", _validated(seen)) if part)


def _validated(seen: Mapping[str, str]) -> str:
    return f"On the validation set: {', '.join(f'{words} {value}' for words, value in seen.items())}." if seen else ""


def _parameters(total: Any, trained: Any) -> str:
    if not isinstance(total, int):
        return ""
    return f"{total:,}" + (f", {trained:,} of them trained" if isinstance(trained, int) and trained != total else "")


def _end(summary: RunSummary, name: str) -> float | None:
    curve = summary.curves.get(name)
    return curve.values[-1] if curve is not None and curve.values else None


def _results(summary: RunSummary) -> str:
    evaluations = {name: _shown_all(record) for name, record in summary.evaluations.items()}
    shown = results_markdown(replace(summary, is_run=False, evaluations=evaluations, warnings=()))
    return shown or (
        "No evaluation is recorded. `potstill evaluate RUN --data FILE` makes one, and `potstill export RUN --output FOLDER` puts it here."
    )


def _shown_all(value: Any) -> Any:
    """An evaluation's texts without the folders of this machine."""
    if isinstance(value, str):
        return _without_paths(redact_text(value))
    if isinstance(value, Mapping):
        return {key: _shown_all(item) for key, item in value.items()}
    return [_shown_all(item) for item in value] if isinstance(value, list | tuple) else value


def _use(recipe: Mapping[str, Any], is_adapter: bool) -> str:
    if is_adapter:
        lines = ["from peft import AutoPeftModelForCausalLM", "", 'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")']
        return f"It is an adapter of {escaped(str(recipe.get('student.path', 'its base')))}.\n\n" + _code(lines)
    return _code([
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "", 'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ])  # fmt: skip


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _limits(summary: RunSummary) -> str:
    lines = ["It knows what its text and its teacher taught it, with their mistakes and their slant; nobody has examined it for safety."]
    lines.append("The licenses of the base model, the teacher and the data hold for it; this card claims none.")
    if not summary.evaluations:
        lines.append("Losses say how well it imitates, not what it is good for.")
    if isinstance(refused := summary.finished.get("non_finite_steps"), int) and refused:
        lines.append(f"{refused:,} steps were not taken, because their loss or gradient was not finite.")
    warnings = [warning for name, record in summary.evaluations.items() for warning in _shown_all(record.get("warnings", ()))]
    return "\n".join(f"- {line}" for line in (*lines, *map(escaped, warnings)))


def _versions(summary: RunSummary) -> str:
    versions = summary.sessions[-1].get("versions", {}) if summary.sessions else {}
    return ", ".join(escaped(f"{name} {versions[name]}") for name in _PACKAGES if name in versions)
