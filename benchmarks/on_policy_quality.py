"""Who should write the text? SFT, offline KD, GKD, MiniLLM and DistiLLM on the quickstart's tasks, at equal updates and at equal compute.

    potstill quickstart                                   # makes the tasks and the teacher; once
    python benchmarks/on_policy_quality.py rates [--seed 0]                 # each method's learning rate, chosen on the validation tasks
    python benchmarks/on_policy_quality.py run [--seeds 0 1 2] [--by updates|compute]
    python benchmarks/on_policy_quality.py table

Every student of a seed begins with the same weights: some steps of SFT on the transfer tasks. Then each method goes on by itself, with
the same rows in the same order, the same batch and the same schedule. `--by updates` gives each the same number of optimizer steps,
`--by compute` the same processor time, measured in the first: cheap methods then take more steps. Runs are ordinary runs in
FOLDER/on-policy, so a broken-off comparison goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

QUICKSTART = Path("runs/quickstart")
START_STEPS, STEPS, RATE_STEPS, BATCH = 300, 200, 300, 16
RATES = (1e-3, 3e-3)
SEEDS = (0, 1, 2)
MAX_TOKENS, NEW_TOKENS = 256, 64

SAMPLING = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS}
METHODS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "offline KD": {"objective": {"divergence": "forward_kl", "kd_ratio": 0.5}},
    "GKD, half on-policy": {
        "objective": {"divergence": "jsd", "beta": 0.5, "kd_ratio": 1.0},
        "rollouts": {"author": "mixture", "student": 0.5, "sampling": SAMPLING},
    },
    "GKD, on-policy": {
        "objective": {"divergence": "reverse_kl", "kd_ratio": 1.0}, "rollouts": {"author": "student", "sampling": SAMPLING},
    },
    "MiniLLM": {
        "objective": {"divergence": "reverse_kl", "kd_ratio": 1.0, "policy": {"future": "mean", "ratio": "truncate"}},
        "rollouts": {"author": "teacher_mixed", "teacher_share": 0.2, "sampling": SAMPLING},
    },
    "DistiLLM": {
        "objective": {"divergence": "skew_forward_kl", "alpha": 0.1, "kd_ratio": 1.0},
        "rollouts": {"author": "replay", "sampling": SAMPLING, "replay": {"capacity": 1000, "schedule": "distillm", "start": 0.5}},
    },
}  # fmt: skip


def slug(method: str) -> str:
    return method.lower().replace(",", "").replace(" ", "-")


def recipe_of(method: str, seed: int, folder: Path, *, steps: int, rate: float, start: Path | None) -> dict[str, Any]:
    """`start` None: from random weights, the first part that all methods share."""
    data = {
        "train": str(QUICKSTART / "data" / "transfer.jsonl"), "validation": str(QUICKSTART / "data" / "validation.jsonl"),
        "format": "instruct", "max_tokens": MAX_TOKENS, "packing": False,
    }  # fmt: skip
    said: dict[str, Any] = {
        "student": {"path": str(QUICKSTART / "start" / "student"), "weights": "random"} if start is None else {"path": str(start)},
        "data": data,
        "training": {
            "steps": steps, "batch_size": BATCH, "learning_rate": rate, "scheduler": "cosine", "warmup_steps": min(20, steps // 4),
            "weight_decay": 0.01, "adam_beta2": 0.98, "precision": "float32", "save_steps": steps, "eval_steps": max(1, steps // 5),
            "keep_checkpoints": 1, "logging_steps": max(1, steps // 20), "compile": "off",
        },
        "run": {"folder": str(folder), "seed": seed if start is None else seed + 100},  # other rows first than in the first part
    }  # fmt: skip
    chosen = METHODS[method]
    if chosen:
        said |= {"teacher": {"kind": "local", "path": str(QUICKSTART / "teacher" / "student")}, **chosen}
    return said


def train(said: dict[str, Any]) -> float:
    """Processor seconds of the run, 0 where it was finished before."""
    from potstill.recipes.assemble import run
    from potstill.recipes.read import recipe_from_values

    recipe = recipe_from_values(said)
    began = time.process_time()
    finished = (Path(recipe.run.folder) / "summary.json").is_file()
    run(recipe, command="distill" if recipe.teacher else "finetune", quiet=True)
    return 0.0 if finished else time.process_time() - began


def start_of(seed: int, folder: Path) -> Path:
    at = folder / f"start-{seed}"
    train(recipe_of("SFT", seed, at, steps=START_STEPS, rate=3e-3, start=None))
    return at / "student"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1))


# ---------------------------------------------------------------- the three commands


def choose_rates(folder: Path, methods: list[str], seed: int) -> None:
    """The rate with the best exact match on the validation tasks; they are no part of the test."""
    from potstill.models.config import ModelConfig
    from potstill.models.loading import load_tokenizer
    from potstill.recipes.quickstart_results import Exam, load_for_exam

    tokenizer = load_tokenizer(ModelConfig(path=str(QUICKSTART / "teacher" / "student")))
    exam = Exam(QUICKSTART / "data" / "validation.jsonl", tokenizer, MAX_TOKENS)
    start = start_of(seed, folder)
    for method in methods:
        found = {}
        for rate in RATES:
            at = folder / "rates" / f"{slug(method)}-{rate:g}"
            train(recipe_of(method, seed, at, steps=RATE_STEPS, rate=rate, start=start))
            found[rate] = exam.take(load_for_exam(at / "student", tokenizer), None).scores.estimate("exact_match").value
        rates = read(folder / "rates.json")
        write(folder / "rates.json", rates | {method: {"chosen": max(found, key=lambda rate: found[rate]), "validation": found}})
        print(method, {f"{rate:g}": round(value, 3) for rate, value in found.items()}, flush=True)


def compare(folder: Path, methods: list[str], seeds: list[int], by: str) -> None:
    rates = read(folder / "rates.json")
    for seed in seeds:
        start = start_of(seed, folder)
        for method in methods:
            steps = STEPS if by == "updates" else _affordable(folder, method)
            at = folder / by / f"{slug(method)}-{seed}"
            seconds = train(recipe_of(method, seed, at, steps=steps, rate=rates[method]["chosen"], start=start))
            if seconds:
                record = {"method": method, "seed": seed, "steps": steps, "seconds": seconds}
                write(at.with_suffix(".json"), record)
                print(record, flush=True)


def _affordable(folder: Path, method: str) -> int:
    """Steps that take as long as the dearest method's."""
    spent: dict[str, list[float]] = {}
    for file in (folder / "updates").glob("*.json"):
        record = read(file)
        spent.setdefault(record["method"], []).append(record["seconds"])
    seconds = {name: float(np.mean(values)) for name, values in spent.items()}
    return round(STEPS * max(seconds.values()) / seconds[method])


_COLUMNS = ("method", "steps", "seconds", "exact match", "against SFT", "against offline KD", "forward KL (against SFT)", "bits per byte")
_DISTANCES = ("forward_kl", "bits_per_byte")


def show(folder: Path) -> None:
    """Each method against SFT and against offline KD on the test tasks, with the error of tasks and seeds."""
    from potstill.evaluation.comparison import format_p
    from potstill.evaluation.scores import compare_scores, estimate_over_seeds
    from potstill.models.config import ModelConfig
    from potstill.models.loading import load_tokenizer
    from potstill.recipes.quickstart_results import Exam, load_for_exam

    tokenizer = load_tokenizer(ModelConfig(path=str(QUICKSTART / "teacher" / "student")))
    exam = Exam(QUICKSTART / "data" / "test.jsonl", tokenizer, MAX_TOKENS)
    teacher = load_for_exam(QUICKSTART / "teacher" / "student", tokenizer)
    print(f"teacher: {exam.take(teacher, None).scores.estimate('exact_match').value:.3f} exact match; {len(exam.rows)} test tasks")
    for by in ("updates", "compute"):
        records = [read(file) for file in sorted((folder / by).glob("*.json"))]
        if not records:
            continue
        print(f"\nat equal {by}\n| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|")
        measured = {}
        seeds = sorted({record["seed"] for record in records})
        starts = [exam.take(load_for_exam(folder / f"start-{seed}" / "student", tokenizer), teacher).scores for seed in seeds]
        begun = {name: estimate_over_seeds(name, starts) for name in ("exact_match", *_DISTANCES)}
        cells = ["where all begin", "", "", *(_said(begun[name]) if name else "" for name in ("exact_match", "", "", *_DISTANCES))]
        print("| " + " | ".join(cells) + " |")
        for method in METHODS:
            mine = sorted((record for record in records if record["method"] == method), key=lambda record: record["seed"])
            runs = [folder / by / f"{slug(method)}-{record['seed']}" for record in mine]
            measured[method] = [exam.take(load_for_exam(at / "student", tokenizer), teacher).scores for at in runs]
            if not mine:
                continue
            row = {name: estimate_over_seeds(name, measured[method]) for name in ("exact_match", *_DISTANCES)}
            cells = [method, str(mine[0]["steps"]), f"{np.mean([record['seconds'] for record in mine]):.0f}"]
            cells.append(_said(row["exact_match"]))
            for other in ("SFT", "offline KD"):
                if method == other or len(measured.get(other, ())) != len(mine):
                    cells.append("")
                    continue
                found = compare_scores("exact_match", measured[method], measured[other])
                cells.append(f"{found.difference.value:+.3f} ({found.low:+.3f} to {found.high:+.3f}, {format_p(found.p_value)})")
            cells.append(_said(row["forward_kl"]))
            if method != "SFT" and measured["SFT"]:
                kl = compare_scores("forward_kl", measured[method], measured["SFT"])
                cells[-1] += f" ({kl.difference.value:+.3f}, {format_p(kl.p_value)})"
            cells.append(_said(row["bits_per_byte"]))
            print("| " + " | ".join(cells) + " |", flush=True)


def _said(estimate) -> str:
    error = estimate.standard_error
    return f"{estimate.value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("rates", "run", "table"))
    parser.add_argument("--folder", type=Path, default=QUICKSTART.parent / "on-policy")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--seed", type=int, default=7, help="of the runs that choose learning rates")
    parser.add_argument("--by", choices=("updates", "compute"), default="updates")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.command == "rates":
        choose_rates(asked.folder, asked.methods, asked.seed)
    elif asked.command == "run":
        compare(asked.folder, asked.methods, asked.seeds, asked.by)
    else:
        show(asked.folder)


if __name__ == "__main__":
    main()
