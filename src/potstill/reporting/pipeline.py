"""What was done, in words: a recipe's student, teacher, text, objective, data and budget as sentences. Reads flattened recipes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.reporting.summary import RunSummary

# Keys in which runs of one cell differ: the seed, and where things lie.
OF_A_SEED = ("run.seed", "run.folder", "data.seed")
_DIVERGENCES = {
    "forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "Jensen-Shannon divergence", "skew_forward_kl": "skewed forward KL",
    "skew_reverse_kl": "skewed reverse KL", "mixed_kl": "mixed KL", "adaptive_kl": "adaptive KL", "tvd": "total variation",
    "alpha_beta": "alpha-beta divergence", "logit_mse": "squared distance of logits", "dkd": "decoupled KD",
}  # fmt: skip
_AUTHORS = {
    "dataset": "the data set's own answers", "student": "the student writes, the teacher judges every token",
    "teacher": "the teacher writes", "mixture": "the data set and the student in turn",
    "teacher_mixed": "drawn from student and teacher together", "replay": "the student writes, into a replay buffer",
    "pair": "an answer of the teacher and one of the student to each prompt",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed and their folder alone; `members` are their positions among all summaries."""

    name: str
    members: tuple[int, ...]


def cells(summaries: Sequence[RunSummary]) -> list[Cell]:
    """Runs put together by recipe; a run whose recipe does not read stands alone."""
    found: dict[Any, list[int]] = {}
    for position, summary in enumerate(summaries):
        if summary.is_run:
            fixed = tuple(sorted((key, repr(value)) for key, value in summary.recipe.items() if key not in OF_A_SEED))
            found.setdefault(fixed or position, []).append(position)
    of_studies = {cell.name for summary in summaries if summary.study is not None for cell in summary.study.cells}
    named = [Cell(_cell_name([summaries[place] for place in places], of_studies), tuple(places)) for places in found.values()]
    names = [cell.name for cell in named]
    return [cell if names.count(cell.name) == 1 else Cell(summaries[cell.members[0]].name, cell.members) for cell in named]


def _cell_name(runs: Sequence[RunSummary], of_studies: set[str]) -> str:
    """The name that a study gave, whose runs are called CELL-SEED, else what the runs' names share."""
    stated = {run.name.rpartition("-")[0] for run in runs}
    return stated.pop() if len(stated) == 1 and stated <= of_studies else _shared_name([run.name for run in runs])


def _shared_name(names: Sequence[str]) -> str:
    """What the names of one cell's runs begin with: "kd" of "kd-0" and "kd-1"."""
    if len(names) == 1:
        return names[0]
    shortest = min(names, key=len)
    length = next((place for place, sign in enumerate(shortest) if any(name[place] != sign for name in names)), len(shortest))
    begin = shortest[:length].removesuffix("seed").rstrip("-_./= ")
    return begin or names[0]


def in_words(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What a run did: one short line a subject, in the order of the pipeline."""
    if not recipe:
        return {}
    lines = {
        "student": _model(recipe, "student"), "teacher": _teacher(recipe), "text": _text(recipe), "objective": _objective(recipe),
        "data": _data(recipe), "budget": _budget(recipe),
    }  # fmt: skip
    return {subject: line for subject, line in lines.items() if line}


def _model(recipe: Mapping[str, Any], section: str) -> str:
    words = [str(recipe.get(f"{section}.path", "")) or "a model"]
    if recipe.get(f"{section}.weights") == "random":
        words.append("from random weights")
    if recipe.get(f"{section}.adapter"):
        words.append(f"with the adapter {recipe[f'{section}.adapter']}")
    quantization = recipe.get(f"{section}.quantization") or recipe.get(f"{section}.quantization.kind")
    if quantization:
        words.append(f"quantised ({quantization})")
    if recipe.get(f"{section}.lora.rank"):
        words.append(f"trained by LoRA of rank {recipe[f'{section}.lora.rank']}")
    return ", ".join(words)


def _teacher(recipe: Mapping[str, Any]) -> str:
    if not any(key == "teacher" or key.startswith("teacher.") for key in recipe):
        return "none: the text alone is learned"
    kind = recipe.get("teacher.kind", "local")
    if kind == "local":
        return _model(recipe, "teacher")
    if kind == "cache":
        return f"recorded answers in {recipe.get('teacher.path', 'a cache')}"
    if kind == "server":
        return f"{recipe.get('teacher.model', 'a model')} behind a server at {recipe.get('teacher.url', 'an address')}"
    if kind == "self":
        return "the student itself" + (", with a prompt that tells it more" if recipe.get("data.teacher_prompt") else "")
    return f"{kind}"


def _text(recipe: Mapping[str, Any]) -> str:
    author = str(recipe.get("rollouts.author", "dataset"))
    words = [_AUTHORS.get(author, author)]
    if author == "mixture" and "rollouts.student" in recipe:
        words.append(f"{shown(recipe['rollouts.student'])} of it the student's")
    if author != "dataset" and "rollouts.sampling.temperature" in recipe:
        words.append(f"temperature {shown(recipe['rollouts.sampling.temperature'])}")
    return ", ".join(words)


def _objective(recipe: Mapping[str, Any]) -> str:
    divergence = str(recipe.get("objective.divergence", "forward_kl"))
    given = (recipe.get(f"objective.{key}") for key in ("kd_ratio", "kd_weight", "sft_weight"))
    ratio, kd, ce = (value if isinstance(value, int | float) else None for value in given)
    if divergence == "cross_entropy":
        return "cross-entropy of the text"
    if kd is None and ce is None:
        kd = 0.5 if ratio is None else ratio
        ce = 1 - kd
    kd, ce = kd or 0, ce or 0
    if not kd:
        return "cross-entropy of the text"
    words = [_DIVERGENCES.get(divergence, divergence)]
    if ce:
        words = [f"{ce:.4g} × cross-entropy + {kd:.4g} × {words[0]}"]
    if recipe.get("objective.temperature", 1) != 1:
        words.append(f"temperature {shown(recipe['objective.temperature'])}")
    support = recipe.get("objective.support", "full")
    if support != "full":
        size = recipe.get("objective.top_k") or recipe.get("objective.num_samples")
        words.append(f"over {str(support).replace('_', ' ')}" + (f" (K = {size})" if size else ""))
    if recipe.get("objective.token_weight", "none") != "none":
        words.append(f"weighed by {str(recipe['objective.token_weight']).replace('_', ' ')}")
    return ", ".join(words)


def _data(recipe: Mapping[str, Any]) -> str:
    train = recipe.get("data.train")
    if train is None:
        return ""
    listed = train if isinstance(train, list) else [train]
    sources = [str(one.get("path", one)) if isinstance(one, Mapping) else str(one) for one in listed]
    words = [" + ".join(sources)]
    words += [f"{recipe['data.format']} format"] if recipe.get("data.format") else []
    words += [f"at most {recipe['data.max_tokens']:,} tokens a row"] if isinstance(recipe.get("data.max_tokens"), int) else []
    words += ["packed"] if recipe.get("data.packing") is True else []
    return ", ".join(words)


def _budget(recipe: Mapping[str, Any]) -> str:
    get = {key.removeprefix("training."): value for key, value in recipe.items() if key.startswith("training.")}.get
    words = [f"{shown(get('steps'))} steps"] if get("steps") else [f"{get('epochs')} epochs"] if get("epochs") else []
    if isinstance(get("batch_size"), int):
        accumulated = f" × {get('accumulation')}" if get("accumulation", 1) != 1 else ""
        words.append(f"batches of {get('batch_size')}{accumulated} rows")
    if get("learning_rate") is not None:
        words.append(f"learning rate {shown(get('learning_rate'))} ({get('scheduler', 'constant')})")
    words += [str(get("precision"))] if get("precision") else []
    return ", ".join(words)


def outcome_in_words(finished: Mapping[str, Any]) -> str:
    """What a finished run says of itself: steps, tokens, time, parameters."""
    words = []
    for key, unit in (("steps", "steps"), ("target_tokens", "target tokens"), ("parameters", "parameters")):
        if isinstance(finished.get(key), int):
            words.append(f"{finished[key]:,} {unit}")
    if isinstance(finished.get("trainable_parameters"), int) and finished["trainable_parameters"] != finished.get("parameters"):
        words.append(f"{finished['trainable_parameters']:,} of them trained")
    if isinstance(finished.get("seconds"), int | float):
        words.append(duration(finished["seconds"]))
    if isinstance(finished.get("peak_gib"), int | float):
        words.append(f"peak memory {finished['peak_gib']:.2f} GiB")
    return ", ".join(words)


def shown(value: Any) -> str:
    """A value of a recipe: a number in as many digits as it has, else as it stands."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def duration(seconds: float) -> str:
    """43 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
