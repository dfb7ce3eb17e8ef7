"""The command line. It reads arguments, imports what a command needs when it runs, and says in one line what the user did wrong."""

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from potstill.cli_evaluate import evaluate
from potstill.cli_judge import judge
from potstill.cli_study import studies_app, study
from potstill.environment import quiet_libraries, redact_text
from potstill.errors import PotstillError
from potstill.interruption import follow_leash

app = typer.Typer(
    name="potstill", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Distils large language models: the knowledge of a large teacher goes into a student that is small enough to serve.",
    epilog="A recipe is a YAML file or a name of the library (potstill recipes). Any key can be set behind it: training.batch_size=2",
)  # fmt: skip
recipes_app = typer.Typer(help="Lists the recipes of the library; `show NAME` prints one.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(studies_app, name="studies")
cache_app = typer.Typer(help="Looks at caches of recorded answers, verifies them and puts them together.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a recipe of the library.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys set here, as in training.batch_size=2.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove what an earlier run left in the run folder and start over.")]
OverrideResume = Annotated[
    list[str] | None, typer.Option("--override-resume", metavar="KEY", help="Resume although this key changed; may be repeated.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.command()
def quickstart(
    folder: Annotated[str, typer.Option(help="Where everything goes.")] = "runs/quickstart",
    fresh: Fresh = False,
    scramble_teacher: Annotated[bool, typer.Option("--scramble-teacher", help="Also learn from a teacher with shuffled weights.")] = False,
    quiet: Quiet = False,
) -> None:
    """The main job in minutes, offline, on data that it makes itself: a teacher, its students with and without it, and a table."""
    quiet_libraries()
    from potstill.recipes.quickstart import quickstart as start

    start(folder, fresh=fresh, scramble_teacher=scramble_teacher, quiet=quiet)


@app.command()
def distill(
    recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, override_resume: OverrideResume = None, quiet: Quiet = False
) -> None:
    """Trains a student with a teacher's next-token distributions, as a recipe says. The same command resumes a run that was broken off."""
    _train("distill", recipe, overrides, fresh, override_resume, quiet)


@app.command()
def finetune(
    recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False, override_resume: OverrideResume = None, quiet: Quiet = False
) -> None:
    """Trains a model on text alone, whole or with LoRA: a teacher before distillation, or a student's twin without a teacher."""
    _train("finetune", recipe, overrides, fresh, override_resume, quiet)


def _train(
    command: Literal["distill", "finetune"], name: str, overrides: list[str] | None, fresh: bool,
    override_resume: list[str] | None, quiet: bool,
) -> None:  # fmt: skip
    from potstill.recipes.precheck import precheck
    from potstill.recipes.read import read_recipe, refuse_command

    recipe = read_recipe(name, overrides or ())
    refuse_command(command, recipe, name)
    precheck(recipe)
    quiet_libraries()
    from potstill.recipes.assemble import run

    run(recipe, command=command, fresh=fresh, override_resume=override_resume or [], quiet=quiet)


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Shows what a recipe would do (pipeline, an example, tokenizers, memory, steps) and refuses what must fail. Loads no weights."""
    from potstill.recipes.precheck import precheck
    from potstill.recipes.read import read_recipe

    read = read_recipe(recipe, overrides or ())
    precheck(read)
    quiet_libraries()
    from potstill.recipes.check import check as look

    raise typer.Exit(look(read))


@app.command()
def capture(
    recipe: RecipeArgument, overrides: Overrides = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only the I-th of N shares, counted from 1, as in 2/8.")] = None,
    engine: Annotated[str | None, typer.Option(help="ray: spread the work over a Ray cluster (pip install 'potstill[ray]').")] = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Records a teacher's answers to a recipe's rows, to train from later without it. The same command goes on where one was broken off."""
    from potstill.recipes.precheck import precheck_capture
    from potstill.recipes.read import read_recipe

    read = read_recipe(recipe, overrides or ())
    share = precheck_capture(read, recipe, shard, engine)
    quiet_libraries()
    from potstill.recipes.capturing import capture_recipe

    capture_recipe(read, recipe, overrides or (), shard=share, engine=engine, quiet=quiet)


@app.command()
def generate(recipe: RecipeArgument, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Writes a data set: the recipe's rows with answers of its teacher or student in place of their own. The same command goes on."""
    from potstill.recipes.generate_rules import precheck_generate
    from potstill.recipes.read import read_recipe

    read = read_recipe(recipe, overrides or ())
    precheck_generate(read, recipe)
    quiet_libraries()
    from potstill.recipes.generating import generate_recipe

    generate_recipe(read, quiet=quiet)


CachePath = Annotated[str, typer.Argument(help="The cache: a folder, or any path that fsspec knows.", show_default=False)]


@cache_app.command("inspect")
def cache_inspect(
    path: CachePath, overrides: Overrides = None,
    teacher: Annotated[str | None, typer.Option(metavar="RECIPE", help="Also ask this recipe's teacher, for what records lose.")] = None,
) -> None:  # fmt: skip
    """Answers, bytes a token, the mass of the kept ids, provenance; with a teacher at hand also what the records lose against it."""
    quiet_libraries()
    from potstill.recipes.caches import inspect_cache

    sys.stdout.write(_safe(inspect_cache(path, teacher, overrides or ())))


@cache_app.command("verify")
def cache_verify(
    path: CachePath, overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Also list the rows of this recipe that have no answer.")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Leave out what is damaged, so that the next capture asks for it again.")] = False,
) -> None:  # fmt: skip
    """Compares every record with its checksum. Exit code 1 where something is damaged or missing."""
    quiet_libraries()
    from potstill.recipes.caches import verify_cache

    text, code = verify_cache(path, recipe, overrides or (), drop=drop)
    sys.stdout.write(_safe(text))
    raise typer.Exit(code)


@cache_app.command("merge")
def cache_merge(
    out: Annotated[str, typer.Argument(help="The cache to write; it may hold some of the answers already.", show_default=False)],
    paths: Annotated[list[str], typer.Argument(help="The caches to take answers from.", show_default=False)],
) -> None:
    """Puts caches of one teacher that several machines made together. Exit code 1 where damaged answers could not be copied."""
    from potstill.recipes.caches import merge_caches

    text, code = merge_caches(out, paths)
    sys.stdout.write(_safe(text))
    raise typer.Exit(code)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """Lists the recipes of the library; `show NAME` prints one."""
    if context.invoked_subcommand is not None:
        return
    from potstill.recipes.read import library, print_library

    print_library("recipe", "what it does", library())


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="The name of a recipe of the library.")]) -> None:
    """Prints a recipe of the library, to read or to copy into a file of your own."""
    from potstill.recipes.read import find_text

    sys.stdout.write(find_text(name)[0])


app.command()(evaluate)


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders, folders of runs, such as a study's, or records of evaluate.", show_default=False)
    ],
    output: Annotated[
        str | None, typer.Option(help="Where to write the page, by default report.html in the first folder; Markdown where it ends in .md.")
    ] = None,
) -> None:
    """Writes one HTML page about runs or a study: what was done, results and what they say, answers side by side, curves, recipes."""
    from potstill.reporting.page import write_report

    sys.stdout.write(_safe(f"written to {write_report(runs, output)}\n"))


@app.command()
def watch(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or a folder that holds runs, such as a study's.", show_default=False)],
    once: Annotated[bool, typer.Option("--once", help="Print how things stand now, and leave.")] = False,
) -> None:
    """Shows runs while they go on: losses, speed, time left, the last validation, the last text that a model wrote. Ctrl-C leaves."""
    from potstill.reporting.watch import watch as look_on

    look_on(runs, once=once)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A finished run folder, or RUN/checkpoints/step-N of any run.", show_default=False)],
    output: Annotated[str, typer.Option(help="The folder to write: it gets student/ and adapter/.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge/--no-merge", help="Put the adapter into the weights, or keep it apart.")] = True,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default as trained.")] = None,
) -> None:
    """Writes the student of a run once more: its adapter merged into the weights or apart, in the dtype that you want."""
    from potstill.recipes.request import export_request

    config = export_request(run, dtype)
    quiet_libraries()
    if config is None:
        from potstill.recipes.checkpoints import export_checkpoint

        for folder in export_checkpoint(Path(run), Path(output), merge=merge, dtype=dtype):
            sys.stdout.write(_safe(f"written to {folder}\n"))
        return
    from potstill.recipes.exporting import export_run

    for folder in export_run(config, Path(output), merge=merge, run=Path(run)):
        sys.stdout.write(_safe(f"written to {folder}\n"))


@recipes_app.command("keys")
def show_keys() -> None:
    """Prints every key that a recipe may have: what it holds, its default, what it means."""
    from potstill.recipes.reference import markdown

    sys.stdout.write(markdown())


app.command()(judge)
app.command()(study)


# ---------------------------------------------------------------- what every command shares

# typer brings a click of its own in some versions; this is the base of its errors in all of them.
_USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _safe(f"{record.levelname.lower()}: {record.getMessage()}")


def _safe(text: str) -> str:
    """Without secrets, and without characters that could command a terminal."""
    from potstill.recipes.words import printable

    return printable(redact_text(text))


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    for line in text.splitlines():
        sys.stderr.write(f"potstill: {_safe(line)}\n")


def _run(arguments: list[str] | None) -> int:
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="potstill", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except PotstillError as error:
        from potstill.errors import ConfigError

        # Every rank finds the same mistake in a recipe; one of them says it.
        if _first_rank() or not isinstance(error, ConfigError):
            _say(str(error))
        return error.exit_code
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        return 130
    except _USAGE_ERROR as error:
        _say(f"{error.format_message()} (potstill --help says what there is)")  # type: ignore[attr-defined]
        return 2
    except BrokenPipeError:
        # Whoever read our output has seen enough; without this Python complains once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        # Our own mistake: the whole traceback, but no values of variables and no secrets.
        sys.stderr.write(_safe(traceback.format_exc()))
        return 1


def main(arguments: list[str] | None = None) -> None:
    """The entry point of `potstill` and `python -m potstill`. Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + n for signal n."""
    log = logging.getLogger("potstill")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_OneLine())
        log.addHandler(handler)
        log.setLevel(logging.WARNING if _first_rank() else logging.ERROR)
        log.propagate = False
    follow_leash()
    sys.exit(_run(arguments))
