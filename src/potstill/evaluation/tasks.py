"""Every kind of task that a request may name, and the class that measures it. Imports a kind's libraries when it is asked for."""

from collections.abc import Callable, Sequence

from potstill.evaluation.config import AnyTask
from potstill.evaluation.task import Task


def make_tasks(configs: Sequence[AnyTask]) -> list[Task]:
    """The tasks that a request names, in its order. Raises ConfigError for one that cannot be made."""
    return [_MAKERS[config.kind](config) for config in configs]


def _text(config) -> Task:
    from potstill.evaluation.text_task import TextTask

    return TextTask(config)


def _harness(config) -> Task:
    from potstill.evaluation.harness.task import HarnessTask

    return HarnessTask(config)


def _questions(config) -> Task:
    from potstill.evaluation.questions_task import QuestionsTask

    return QuestionsTask(config)


def _own_text(config) -> Task:
    from potstill.evaluation.own_text_task import OwnTextTask

    return OwnTextTask(config)


def _speculation(config) -> Task:
    from potstill.evaluation.speculation_task import SpeculationTask

    return SpeculationTask(config)


def _samples(config) -> Task:
    from potstill.evaluation.samples_task import SamplesTask

    return SamplesTask(config)


_MAKERS: dict[str, Callable[..., Task]] = {
    "text": _text,
    "own_text": _own_text,
    "speculation": _speculation,
    "questions": _questions,
    "samples": _samples,
    "harness": _harness,
}
