"""The command line of `potstill evaluate`."""

import sys
from typing import Annotated

import typer

from potstill.environment import quiet_libraries, redact_text


def evaluate(
    models: Annotated[list[str] | None, typer.Argument(
        metavar="[MODEL]...", help="Model folders, names on the hub or run folders (their students); NAME=A,B are the seeds of one row.",
    )] = None,
    data: Annotated[list[str] | None, typer.Option(help="A text: a file or a hub name, as data.train in a recipe.")] = None,
    format: Annotated[str | None, typer.Option(help="Of the text: instruct (as said by default), chat, prompt_completion or text.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-evaluation-harness: NAME, or NAME=FILE with your own data.")] = None,
    plan: Annotated[str | None, typer.Option(help="A YAML file with tasks of every kind, models, teacher, baseline.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A model to compare with: folder, hub name or run folder.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The row that every other one is compared with; by default the first.")] = None,
    output: Annotated[str | None, typer.Option(help="Where to write the record, a .json file; a run folder keeps its own.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="More, as in data.max_tokens=512.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:  # fmt: skip
    """Measures models on tasks: texts, benchmarks, agreement with a teacher, written answers; with uncertainty, and compared in pairs."""
    from potstill.recipes.request import evaluation_request

    config, output = evaluation_request(
        models or (), data or (), format, teacher, output, settings or (), plan=plan, tasks=task or (), baseline=baseline
    )
    quiet_libraries()
    from potstill.evaluation.evaluate import evaluate as measure
    from potstill.recipes.checkpoints import with_students
    from potstill.recipes.words import printable
    from potstill.reporting.terminal import print_evaluation

    print_evaluation(measure(with_students(config), output=output, quiet=quiet).to_json())
    if output is not None:
        sys.stdout.write(printable(redact_text(f"written to {output}\n")))
