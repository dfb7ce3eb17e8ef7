"""The harness beside our own progress bars: its bars and notes are kept off the terminal, and it downloads no code."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

from potstill.errors import UsageError


class Notes(logging.Handler):
    """Collects what the harness warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def quietly() -> Iterator[Notes]:
    """While the harness works: no bars, its warnings into the notes, and `evaluate.load`, which runs code of the hub, refused."""
    import datasets
    import evaluate
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm

    def no_bar(*items: Any, **said: Any) -> Any:
        return tqdm(*items, **{**said, "disable": True})

    logger, notes = logging.getLogger("lm_eval"), Notes()
    had_bars = datasets.is_progress_bar_enabled()
    places = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    swapped: list[tuple[Any, str, Any]] = [(place, "tqdm", no_bar) for place in places] + [(evaluate, "load", _refuse_code)]
    before = [getattr(module, name) for module, name, _ in swapped]
    propagate = logger.propagate
    logger.addHandler(notes)
    logger.propagate = False
    datasets.disable_progress_bars()
    for module, name, value in swapped:
        setattr(module, name, value)
    try:
        yield notes
    finally:
        for (module, name, _), value in zip(swapped, before, strict=True):
            setattr(module, name, value)
        if had_bars:
            datasets.enable_progress_bars()
        logger.propagate = propagate
        logger.removeHandler(notes)


def _refuse_code(path: str, *_: Any, **__: Any) -> Never:
    raise UsageError(f"the task would download and run code of the hub (evaluate.load({path!r})); such tasks are not run")
