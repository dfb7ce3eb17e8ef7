"""Several teachers as one: a weighted mean of their probabilities, or each answering the rows that are its own.

It knows teachers and batches; how a mean is taken is the objective's affair, and where a route comes from the data's.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from itertools import groupby
from typing import get_args

import torch
from torch import Tensor

from potstill.batch import Batch, Document, Example
from potstill.data.collation import collate, empty_batch
from potstill.data.examples import ExampleSet
from potstill.errors import IncompatibleError
from potstill.signals import FullOutcomes, MixtureOutcomes, Needs, Offers, Outcomes, RoutedOutcomes, TeacherSignal
from potstill.teachers.teacher import Teacher, confirm, heed, require_answers

_EVERY: frozenset[Outcomes] = frozenset(get_args(Outcomes)) - {"nothing"}


class _Ensemble:
    """What both kinds share: the members, by name, in a fixed order."""

    def __init__(self, members: Mapping[str, Teacher]):
        if not members:
            raise IncompatibleError("teacher.teachers: an ensemble needs a teacher; name at least one")
        self.members = dict(members)

    @property
    def name(self) -> str:
        return f"the ensemble of {', '.join(self.members)}"

    def _identity(self, kind: str) -> dict[str, str]:
        return {"ensemble": kind, **{f"{name}: {key}": value for name, m in self.members.items() for key, value in m.identity.items()}}

    def heed(self, check: Callable[[], None]) -> None:
        for member in self.members.values():
            heed(member, check)

    def confirm(self) -> None:
        for member in self.members.values():
            confirm(member)

    def close(self) -> None:
        """Closes every member, whatever becomes of the others."""
        with ExitStack() as stack:
            for member in self.members.values():
                stack.callback(member.close)


class MixtureTeacher(_Ensemble):
    """p = sum_i w_i p_i with the weights made to add up to 1; equal ones where none are given."""

    def __init__(self, members: Mapping[str, Teacher], weights: Mapping[str, float] | None = None):
        super().__init__(members)
        for name, member in self.members.items():
            if "full" not in member.offers.outcomes:
                raise IncompatibleError(
                    f"teacher.teachers.{name}: {member.name} offers {' or '.join(sorted(member.offers.outcomes))} outcomes, and a mean "
                    "needs full ones of every member; take a local teacher or a cache of hidden rows, or give each row to one teacher "
                    "with teacher.column"
                )
        weights = dict.fromkeys(self.members, 1.0) if weights is None else weights
        bad = [name for name, weight in weights.items() if not (math.isfinite(weight) and weight > 0)]
        if bad or set(weights) != set(self.members):
            found = f"{bad[0]} has {weights[bad[0]]}" if bad else f"they name {sorted(weights)}"
            raise IncompatibleError(f"teacher.weights: one positive number for each of {sorted(self.members)}; {found}")
        total = math.fsum(weights.values())
        self.weights = tuple(weights[name] / total for name in self.members)

    @property
    def offers(self) -> Offers:
        return Offers(frozenset({"full"}))

    @property
    def identity(self) -> Mapping[str, str]:
        return self._identity("mean of " + ", ".join(f"{w!r} {name}" for name, w in zip(self.members, self.weights, strict=True)))

    def score(self, batch: Batch, needs: Needs) -> TeacherSignal:
        """`MixtureOutcomes` for the target rows, or nothing where nothing is asked."""
        if needs.outcomes == "nothing":
            return TeacherSignal()
        answers = []
        for name, member in self.members.items():
            outcomes = member.score(batch, Needs("full")).outcomes
            if not isinstance(outcomes, FullOutcomes):
                raise IncompatibleError(
                    f"teacher.teachers.{name}: a mean needs full outcomes; {member.name} answered {type(outcomes).__name__}"
                )
            answers.append(outcomes)
        return TeacherSignal(MixtureOutcomes(tuple(answers), self.weights))

    def refuse_missing(self, examples: ExampleSet) -> None:
        for member in self.members.values():
            require_answers(member, examples)


class RoutedTeacher(_Ensemble):
    """Each document is answered by the teacher that its route names. `pad_token`: what fills a member's batches."""

    def __init__(self, members: Mapping[str, Teacher], *, pad_token: int = 0):
        super().__init__(members)
        self._pad_token = pad_token
        self._offers = _intersection(self.members)

    @property
    def offers(self) -> Offers:
        return self._offers

    @property
    def identity(self) -> Mapping[str, str]:
        return self._identity("each row to one of " + ", ".join(self.members))

    def score(self, batch: Batch, needs: Needs) -> TeacherSignal:
        """`RoutedOutcomes`: for each teacher the rows of its documents, answered in a batch of their own.

        Every member is asked every time, with padding where no document is its own: a teacher that is sharded over the ranks takes
        part on all of them, whatever rows each has.
        """
        if needs.outcomes == "nothing":
            return TeacherSignal()
        documents = list(zip(_places(batch), batch.sequences(), strict=True))
        unknown = sorted({document.route for _, document in documents} - set(self.members))
        if unknown:
            raise IncompatibleError(f"{self.name}: a row of the batch is for {unknown[0] or 'nobody'!r}; name a teacher for each row")
        parts = []
        for name, member in self.members.items():
            own = [(place, document) for place, document in documents if document.route == name]
            outcomes = member.score(self._batch_of(own, batch), needs).outcomes
            if outcomes is None or isinstance(outcomes, RoutedOutcomes):
                raise IncompatibleError(f"teacher.teachers.{name}: {member.name} answered {type(outcomes).__name__} for its rows")
            parts.append((_rows([document for _, document in own], batch.tokens.device), outcomes))
        asked = [part for part in parts if len(part[0])]
        return TeacherSignal(RoutedOutcomes(tuple(asked or parts[:1])))

    def _batch_of(self, own: list[tuple[tuple[int, int], Document]], batch: Batch) -> Batch:
        """These documents in the rows that they stood in, so that what was packed stays packed and no row grows."""
        if not own:
            return empty_batch(pad_token=self._pad_token, width=min(8, batch.tokens.shape[1])).to(batch.tokens.device)
        rows = [
            [_example(document, index) for (_, index), document in members]
            for _, members in groupby(own, key=lambda placed: placed[0][0])
        ]
        return replace(collate(rows, pad_token=self._pad_token, widest=batch.tokens.shape[1]).to(batch.tokens.device), routes=())

    def refuse_missing(self, examples: ExampleSet) -> None:
        """Raises IncompatibleError for a route that no teacher has, naming the first row, and what each member refuses of its rows."""
        routes = [examples.route(index) for index in range(len(examples))]
        for index, route in enumerate(routes):
            if route not in self.members:
                raise IncompatibleError(
                    f"{examples.origin(index)}: the row is for {route or 'nobody'!r}, and the teachers are {', '.join(self.members)}"
                )
        for name, member in self.members.items():
            require_answers(member, examples.select([index for index, route in enumerate(routes) if route == name]))


def _places(batch: Batch) -> list[tuple[int, int]]:
    """Of each document, in order: its row in the batch, and the number of its example (its own number where the batch has none)."""
    counts = (batch.documents.amax(dim=1) + 1).clamp_min(0).tolist() if batch.documents.shape[1] else []
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    return list(zip(rows, batch.examples or range(len(rows)), strict=True))


def _example(document: Document, index: int) -> Example:
    return Example(document.tokens.tolist(), document.is_target.tolist(), index)


def _rows(documents: list[Document], device: torch.device) -> Tensor:
    """The numbers of the documents' target rows in the whole batch."""
    numbers = [torch.arange(document.rows.start, document.rows.stop) for document in documents]
    return (torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long)).to(device)


def _intersection(members: Mapping[str, Teacher]) -> Offers:
    """What every member can serve. Raises IncompatibleError where that is nothing, or where two records stand at two temperatures."""
    offers = {name: member.offers for name, member in members.items()}
    serves = reduce(frozenset.__and__, (_EVERY if "full" in offer.outcomes else offer.outcomes for offer in offers.values()))
    if not serves:
        said = "; ".join(f"{name} offers {' or '.join(sorted(offer.outcomes))}" for name, offer in offers.items())
        raise IncompatibleError(f"teacher.teachers: no outcomes are offered by all of them: {said}; capture them alike")
    temperatures = {name: offer.temperature for name, offer in offers.items() if offer.temperature is not None}
    if len(set(temperatures.values())) > 1:
        said = ", ".join(f"{name} at {temperature:g}" for name, temperature in temperatures.items())
        raise IncompatibleError(f"teacher.teachers: their answers stand at different temperatures: {said}; capture them at one")
    kept = [offer.top_k for offer in offers.values() if offer.top_k is not None]
    return Offers(serves, min(kept, default=None), next(iter(temperatures.values()), None))
