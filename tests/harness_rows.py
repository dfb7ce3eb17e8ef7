"""Made-up rows in the columns of the hub's data sets, and lm-evaluation-harness asked without Potstill: the reference."""

import json
import warnings
from pathlib import Path

TRUTHFUL = [
    {"question": f"Is {number} a number?", "mc1_targets": {"choices": ["Yes.", "No."], "labels": [1, 0]},
     "mc2_targets": {"choices": ["Yes.", "It is.", "No.", "Never, ever."], "labels": [1, 1, 0, 0]}}
    for number in range(5)
]  # fmt: skip
HELLASWAG = [
    {"ind": number, "activity_label": "Counting", "ctx_a": f"A man counts to {number}.", "ctx_b": "he", "ctx": "", "split": "val",
     "endings": ["stops.", "goes on for a long, long while.", f"says {number} [loudly] twice.", "sleeps now."], "label": str(number % 4)}
    for number in range(12)
]  # fmt: skip
COMMONSENSE = [
    {"id": f"row-{number}", "question": f"What is {number} of it?", "question_concept": "it",
     "choices": {"label": list("ABCDE"), "text": ["bank", "dog", "mall", "fox", "list"]}, "answerKey": "ABCDE"[number % 5]}
    for number in range(11)
]  # fmt: skip
GSM8K = [{"question": f"What is {number} and 2?", "answer": f"It is {number} + 2.\n#### {number + 2}"} for number in range(7)]
BY_NAME = {"truthfulqa_mc2": TRUTHFUL, "hellaswag": HELLASWAG, "commonsense_qa": COMMONSENSE}
SPLIT = {"truthfulqa_mc2": "validation", "hellaswag": "validation", "commonsense_qa": "validation"}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def describe(folder: Path, task: str, file: Path, split: str) -> Path:
    """A task file that a person would write to ask one of the harness's tasks of own rows: it includes the harness's."""
    import lm_eval

    found = [path for path in (Path(lm_eval.__file__).parent / "tasks").glob(f"{task.split('_')[0]}*/*.yaml")
             if f"task: {task}\n" in path.read_text(encoding="utf-8")]  # fmt: skip
    folder.mkdir(exist_ok=True)
    lines = [
        f"include: {found[0]}", "dataset_path: json", "dataset_name: null", f"dataset_kwargs: {{data_files: {{{split}: {file}}}}}",
        "training_split: null",
    ]  # fmt: skip
    (folder / f"{task}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def ask_harness(model, tokenizer, folder: Path, task: str, *, batch_size: int = 8, **settings) -> dict:
    """What `lm_eval.simple_evaluate` says, with the task files of a folder."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks about the machine
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=[task],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False), bootstrap_iters=0, log_samples=True, **settings,
        )  # type: ignore[return-value]  # fmt: skip


def numbers(results: dict, task: str) -> dict[str, float]:
    """The harness's numbers of a task by metric and filter."""
    return {key: value for key, value in results["results"][task].items() if "," in key and "_stderr" not in key}
