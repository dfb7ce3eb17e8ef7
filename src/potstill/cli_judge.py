"""The command line of `potstill judge`: its options, and the same command for later."""

import shlex
import sys
from typing import Annotated

import typer

from potstill.environment import quiet_libraries, redact_text


def judge(
    first: Annotated[str | None, typer.Argument(
        help="Whose win rate is asked for: a run folder, a model, a file of answers, or NAME= before one of these.", show_default=False,
    )] = None,
    second: Annotated[str | None, typer.Argument(help="Whom it is compared with, in the same way.", show_default=False)] = None,
    prompts: Annotated[str | None, typer.Option(help="AlpacaEval's instructions or MT-Bench's questions: a file or a hub name.")] = None,
    format: Annotated[str | None, typer.Option(help="Of the prompts: alpaca_eval or mt_bench; by default as their columns say.")] = None,
    judge: Annotated[str | None, typer.Option(metavar="URL", help="An OpenAI-compatible server; without one answers are written.")] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="The model that judges, as it is served there.")] = None,
    api_key_env: Annotated[str | None, typer.Option(metavar="VAR", help="The environment variable that holds the server's key.")] = None,
    annotations: Annotated[str | None, typer.Option(metavar="FILE", help="AlpacaEval's annotations.json, in place of a judge.")] = None,
    style: Annotated[str | None, typer.Option(help="pairs (by default): which answer is better. grade: each alone, 1 to 10.")] = None,
    folder: Annotated[str | None, typer.Option(help="Where answers, judgments and the record go; by default in judged/.")] = None,
    plan: Annotated[str | None, typer.Option(help="A YAML file with any of these and all other keys.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="More, as in writing.batch_size=16.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:  # fmt: skip
    """Compares the written answers of two chat models by another model's judgment, or grades them; with uncertainty."""
    from potstill.recipes.judge_request import judging_request

    config, also = judging_request(
        first, second, prompts=prompts, format=format, style=style, judge=judge, judge_model=judge_model, api_key_env=api_key_env,
        annotations=annotations, folder=folder, plan=plan, settings=settings or (),
    )  # fmt: skip
    quiet_libraries()
    from potstill.recipes.judging import RECORD
    from potstill.recipes.judging import judge as carry_out
    from potstill.recipes.words import printable

    said = {"--prompts": prompts, "--format": format, "--style": style, "--folder": folder, "--plan": plan}
    words = [*(one for one in (first, second) if one is not None), *(part for option, value in said.items() if value is not None
             for part in (option, value)), *(part for setting in settings or () for part in ("--set", setting))]  # fmt: skip
    record = carry_out(config, also=also, again=shlex.join(["potstill", "judge", *words]), quiet=quiet)
    if record is None:
        return
    from potstill.reporting.terminal import print_evaluation

    print_evaluation(record)
    places = [f"{config.folder}/{RECORD}", *([str(also)] if also is not None else [])]
    sys.stdout.write(printable(redact_text(f"written to {' and '.join(places)}\n")))
