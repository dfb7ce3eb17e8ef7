"""The command line of `potstill study`, and the library of studies."""

import sys
from typing import Annotated

import typer

from potstill.environment import quiet_libraries

studies_app = typer.Typer(help="Lists the studies of the library; `show NAME` prints one.", invoke_without_command=True)


def study(
    study: Annotated[str, typer.Argument(help="A study file, or the name of a study of the library.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(
        metavar="[KEY=VALUE]...", help="Keys of the study, as in seeds='[0]', or of every cell's recipe, as in training.steps=20.",
    )] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side; by default one a GPU, one without GPUs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and what they would cost, and run nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what the study left in its folder and start over.")] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="CELL", help="Train this cell or run alone; may be repeated.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:  # fmt: skip
    """Trains runs that differ in one thing at a time, beside their twins without a teacher, and says which differences are real."""
    quiet_libraries()
    from potstill.studies.study import study as start

    raise typer.Exit(start(study, overrides or (), jobs=jobs, dry_run=dry_run, fresh=fresh, only=only or (), quiet=quiet))


@studies_app.callback()
def studies(context: typer.Context) -> None:
    """Lists the studies of the library; `show NAME` prints one."""
    if context.invoked_subcommand is not None:
        return
    from potstill.recipes.read import print_library
    from potstill.studies.read import library

    print_library("study", "what it asks", library())


@studies_app.command("show")
def show_study(name: Annotated[str, typer.Argument(help="The name of a study of the library.")]) -> None:
    """Prints a study of the library, to read or to copy into a file of your own."""
    from potstill.studies.read import find_text

    sys.stdout.write(find_text(name)[0])
