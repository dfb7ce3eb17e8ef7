"""Run folders and studies as training, evaluation and the study leave them, with numbers from a formula: what reports are tested on."""

import math
from pathlib import Path

from potstill.run_folder import RunFolder
from potstill.storage import make_folder, write_json

TASKS = (("arithmetic", "questions", "target"), ("held-out", "text", "target"), ("commonsense", "harness", "off_target"))
METRICS = {
    "arithmetic": (("exact_match", "exact-match accuracy", "", True, 0.5), ("mean_length", "mean length", "tokens", None, 20.0)),
    "held-out": (
        ("bits_per_byte", "bits per byte", "bits", False, 0.8), ("forward_kl", "forward KL", "nats", False, 0.2),
        ("calibration_error", "calibration error", "", False, 0.06),
    ),
    "commonsense": (("acc_norm", "normalised accuracy", "", True, 0.4),),
}  # fmt: skip


def metric(value, error=0.01, **changes):
    described = {"label": "forward KL", "unit": "nats", "higher_is_better": False, "count": 900, "counted": "targets", "num_clusters": 50}
    return described | {"value": value, "standard_error": error, "low": value - 0.02, "high": value + 0.02} | changes


def write_run(path, recipe, *, steps=40, finish=True, level=0.0, evaluate_every=10, quantities=()):
    """One run folder whose curves fall to `level` above a floor."""
    with RunFolder.open(path, recipe) as folder:
        for step in range(1, steps + 1):
            fall = 3 * math.exp(-5 * step / steps) + 0.4 + level
            noise = 0.15 * math.sin(step * 12.9898 + level * 78.233)
            line = {
                "step": step, "loss/ce": fall + noise, "loss/kd": fall / 3 + noise / 3, "loss": fall * 0.7 + noise / 2, "peak_gib": 1.5,
                "learning_rate": 1e-3 * (1 - step / steps), "tokens_per_second": 9000 + 500 * math.sin(step),
                **dict.fromkeys(quantities, fall),
            }  # fmt: skip
            if step % evaluate_every == 0:
                line |= {"eval_loss/ce": fall + 0.1, "eval_loss/kd": fall / 3 + 0.05}
            folder.append_metrics(line)
        if finish:
            folder.finish({"steps": steps, "seconds": 61.5, "target_tokens": 120_000, "parameters": 235_680, "peak_gib": 1.5})
    return path


def recipe(kd_ratio, seed, text="plain"):
    return {
        "student": {"path": f"models/{text}", "weights": "pretrained"},
        "teacher": {"kind": "local", "path": "models/teacher"} if kd_ratio else None,
        "data": {"train": "rows.jsonl", "format": "instruct", "max_tokens": 512, "packing": True},
        "objective": {"divergence": "forward_kl" if kd_ratio else "cross_entropy", "kd_ratio": kd_ratio},
        "training": {"steps": 40, "batch_size": 8, "learning_rate": 1e-3, "scheduler": "cosine", "precision": "bf16"},
        "run": {"folder": f"runs/{kd_ratio}-{seed}", "seed": seed},
    }


def _model(name, place, *, seeds=3, is_teacher=False):
    metrics = {}
    for task, entries in METRICS.items():
        for short, label, unit, higher, base in entries:
            if is_teacher and short == "forward_kl":
                continue
            gain = 0.03 * place * (-1 if task == "commonsense" else 1) * (1 if higher else -0.5)
            error = 0.012 * max(base, 0.1)
            metrics[f"{task}/{short}"] = {"task": task, "metric": short} | metric(
                base + gain, error, label=label, unit=unit, higher_is_better=higher, low=base + gain - 2 * error,
                high=base + gain + 2 * error,
            )  # fmt: skip
    parameters = 560_256 if is_teacher else 235_680
    return {"name": name, "num_parameters": parameters, "num_seeds": seeds, "is_teacher": is_teacher, "metrics": metrics}


def _pair(first, second, key):
    ours, theirs = first["metrics"][key], second["metrics"][key]
    difference, error = ours["value"] - theirs["value"], 0.012
    visible = abs(difference) > 2.5 * error
    head = f"{ours['label']}: {first['name']} differs by {difference:+.3f} from {second['name']}."
    return {
        "task": ours["task"], "metric": key, "label": ours["label"], "unit": ours["unit"], "higher_is_better": ours["higher_is_better"],
        "first": first["name"], "second": second["name"], "difference": difference, "standard_error": error,
        "low": difference - 2 * error, "high": difference + 2 * error, "p_value": 0.001 if visible else 0.3,
        "p_adjusted": 0.004 if visible else 0.9, "family": "primary", "family_size": 12, "smallest_visible": 0.034,
        "is_significant": visible, "method": "paired, by item and seed",
        "verdict": f"{head} The difference is {'' if visible else 'not '}larger than its uncertainty.",
    }  # fmt: skip


def _samples(names, num_samples, text):
    samples = []
    for item in range(num_samples):
        answers = []
        for place, name in enumerate(names):
            wrong = (item + place) % 3 == 0
            written = f"{item} apples and {item + 1} pears are {2 * item + 1 + wrong} pieces of fruit. {text if place else ''}"
            answers.append({"model": name, "right": not wrong, "text": written})
        prompt = f"How many pieces are {item} apples and {item + 1} pears? {text}"
        samples.append({"task": "arithmetic", "item": f"row {item}", "prompt": prompt, "reference": str(2 * item + 1), "answers": answers})
    return samples


def _series(names):
    found = []
    confidence, lengths, places = [0.05 + 0.1 * step for step in range(10)], [float(8 * step) for step in range(20)], list(range(64))
    for place, name in enumerate(names):
        shares = [math.exp(-(((x - 60 - 4 * place) / 30) ** 2)) for x in lengths]
        drawn = (
            ("calibration", "calibration", "confidence", "share that was right", confidence,
             [min(1.0, max(0.0, x - 0.02 * place * math.sin(math.pi * x))) for x in confidence]),
            ("lengths", "answer lengths", "tokens", "share of answers", lengths, shares),
            ("exposure_bias", "divergence by position", "position", "nats", places, [0.2 + 0.002 * place * x for x in places]),
        )  # fmt: skip
        names_of_parts = ("kind", "label", "x_label", "y_label", "x", "y")
        found += [{"task": "held-out", "model": name, **dict(zip(names_of_parts, parts, strict=True))} for parts in drawn]
    return found


def evaluation(names=("SFT", "KD 0.5", "KD 1"), *, text="", num_samples=12, title="A study of the weight"):
    """A record of version 2: a teacher, the student before training and students, on a target text, a target task and an off-target one."""
    models = [_model("teacher", 6, seeds=1, is_teacher=True), _model("before", -3, seeds=1)]
    models += [_model(name, place) for place, name in enumerate(names)]
    students = models[2:]
    keys = [f"{task}/{metrics[0][0]}" for task, metrics in METRICS.items()]
    pairs = [_pair(model, students[0], key) for model in students[1:] for key in keys]
    pairs += [_pair(model, models[1], key) for model in students for key in keys]
    return {
        "kind": "evaluation", "version": 2, "title": title, "data": {}, "warnings": ["one row was too long"], "baseline": names[0],
        "before": "before", "models": models, "comparisons": pairs,
        "tasks": [{"name": task, "kind": kind, "primary": f"{task}/{METRICS[task][0][0]}", "role": role, "data": {"rows": 450}}
                  for task, kind, role in TASKS],
        "recovered": [
            {"task": "arithmetic", "metric": "arithmetic/exact_match", "model": model["name"], "start": "before", "teacher": "teacher",
             "value": 0.3 + 0.1 * place, "low": 0.2, "high": 0.6, "reason": None} for place, model in enumerate(students)
        ] + [
            {"task": "commonsense", "metric": "commonsense/acc_norm", "model": names[0], "start": "before", "teacher": "teacher",
             "value": None, "low": None, "high": None, "reason": "there is no gap to recover"}
        ],
        "samples": _samples(["teacher", *names], num_samples, text), "series": _series(["teacher", *names]),
    }  # fmt: skip


def write_study(folder: Path, *, ratios=(0.0, 0.25, 0.5, 0.75, 1.0), seeds=(0, 1, 2), steps=200, text="plain", num_samples=12):
    """A study as `potstill study` leaves it: run folders by cell and seed, its record, study.json; the last run is not finished."""
    names = ["sft" if ratio == 0 else f"kd_ratio={ratio:g}" for ratio in ratios]
    cells = []
    for place, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
        runs = []
        for seed in seeds:
            is_last = place == len(names) - 1 and seed == seeds[-1]
            level = -0.05 * place + 0.02 * seed
            write_run(folder / "runs" / f"{name}-{seed}", recipe(ratio, seed, text), steps=steps, finish=not is_last, level=level)
            runs.append({"seed": seed, "folder": f"runs/{name}-{seed}", "status": "failed" if is_last else "finished",
                         "failure": "out of memory" if is_last else None, "steps": steps})  # fmt: skip
        cells.append({"name": name, "is_sft": ratio == 0, "against": None if ratio == 0 else "sft", "runs": runs,
                      "points": [{"objective.kd_ratio": f"kd_ratio={ratio:g}"}] if ratio else []})  # fmt: skip
    axis = {"name": "objective.kd_ratio", "labels": [f"kd_ratio={ratio:g}" for ratio in ratios], "values": list(ratios)}
    make_folder(folder / "evaluation")
    write_json(folder / "evaluation" / "study.json", evaluation(names, text=text, num_samples=num_samples))
    write_json(folder / "study.json", {
        "kind": "study", "version": 1, "title": f"The weight of the divergence, {text}", "baseline": "sft", "seeds": list(seeds),
        "published": "In the published study 0.5 was best.", "axes": [axis], "cells": cells,
        "warnings": [f"{names[-1]}: seed {seeds[-1]} failed: out of memory"],
    })  # fmt: skip
    return folder
