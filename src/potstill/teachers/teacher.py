"""What every teacher can do, and the check, when a run is assembled, that it can do what the objective asks."""

from typing import Protocol

from potstill.batch import Batch
from potstill.errors import IncompatibleError
from potstill.signals import Needs, TeacherSignal


class Teacher(Protocol):
    """Answers, for the target rows of a batch, what it knows of the next token. `name` is for messages."""

    @property
    def name(self) -> str: ...

    @property
    def offers(self) -> Needs: ...

    def score(self, batch: Batch, needs: Needs) -> TeacherSignal:
        """The answer for the rows of `batch.target_rows()`, in their order."""
        ...


def require(teacher: Teacher, needs: Needs, asked_by: str = "the objective") -> None:
    """Raises IncompatibleError, naming both sides, where the teacher does not offer what is asked of it."""
    if not needs.within(teacher.offers):
        raise IncompatibleError(
            f"{asked_by} asks for {needs.outcomes} outcomes of the teacher, but {teacher.name} offers {teacher.offers.outcomes}; "
            "choose another teacher, or an objective for what this one offers"
        )
