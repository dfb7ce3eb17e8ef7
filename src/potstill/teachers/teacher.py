"""What every teacher can do, and the check, when a run is assembled, that it can do what the objective asks."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from potstill.batch import Batch
from potstill.data.examples import ExampleSet
from potstill.errors import IncompatibleError
from potstill.signals import Needs, Offers, TeacherSignal


class Teacher(Protocol):
    """Answers, for the target rows of a batch, what it knows of the next token. `name` is for messages."""

    @property
    def name(self) -> str: ...

    @property
    def offers(self) -> Offers: ...

    @property
    def identity(self) -> Mapping[str, str]:
        """What must not change under a run that is resumed, by name: hashes and settings, never a path or a secret."""
        ...

    def score(self, batch: Batch, needs: Needs) -> TeacherSignal:
        """The answer for the rows of `batch.target_rows()`, in their order, on the batch's device."""
        ...

    def close(self) -> None:
        """Gives back connections, files and threads; a closed teacher is not asked again."""
        ...


@runtime_checkable
class KnowsItsRows(Protocol):
    """A teacher that cannot answer any text: it has records of some, or members for some."""

    def refuse_missing(self, examples: ExampleSet) -> None:
        """Raises PotstillError naming the first row that it cannot answer."""
        ...


@runtime_checkable
class FarAway(Protocol):
    """A teacher that is not in this process: one may have to wait for it, and it may become another one."""

    def heed(self, check: Callable[[], None]) -> None:
        """`check` is called several times a second while an answer is waited for; what it raises ends the waiting."""
        ...

    def confirm(self) -> None:
        """Raises TeacherError where it is another teacher than at the start. Says nothing where it does not answer now."""
        ...


@runtime_checkable
class Follows(Protocol):
    """A teacher that changes as the student learns."""

    def step_done(self) -> None:
        """The student's weights are those after one more optimizer step."""
        ...


def step_done(teacher: Teacher) -> None:
    """Tells a teacher that follows the student of a step."""
    if isinstance(teacher, Follows):
        teacher.step_done()


def heed(teacher: Teacher, check: Callable[[], None]) -> None:
    """Lets `check` break off whatever this teacher waits for."""
    if isinstance(teacher, FarAway):
        teacher.heed(check)


def confirm(teacher: Teacher) -> None:
    """Raises TeacherError where the teacher has become another one; what it has said lately is then not to be kept."""
    if isinstance(teacher, FarAway):
        teacher.confirm()


def require_answers(teacher: Teacher, *sets: ExampleSet | None) -> None:
    """Raises PotstillError, before training, where the teacher cannot answer an example of these sets."""
    for examples in sets:
        if examples is not None and isinstance(teacher, KnowsItsRows):
            teacher.refuse_missing(examples)


def require(teacher: Teacher, needs: Needs, asked_by: str = "the objective") -> None:
    """Raises IncompatibleError, naming both sides, where the teacher does not offer what is asked of it."""
    lacking = teacher.offers.lacks(needs)
    if lacking is not None:
        raise IncompatibleError(
            f"{asked_by} asks for {needs.outcomes} outcomes of the teacher, but {teacher.name} offers {lacking}; "
            "choose another teacher, or an objective for what this one offers"
        )
