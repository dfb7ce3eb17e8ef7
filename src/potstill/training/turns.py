"""The micro-batches of an optimizer step, whoever writes them. It joins orders of rows, an author and collation; it knows no model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from potstill.batch import Batch
from potstill.rollouts.author import Author, Stream
from potstill.training.feeding import Rows
from potstill.training.order import GlobalOrder, MicroBatch, Window


@dataclass(frozen=True)
class Turn:
    """What one rank does at once. `number` counts through the run and its micro-batches and seeds what is random in it; `weight`
    multiplies the mean loss of its stream. Where `everywhere_empty` no rank has a row, and the forward pass can be left out."""

    stream: Stream
    batch: Batch
    number: int
    everywhere_empty: bool
    weight: float = 1.0


@dataclass(frozen=True)
class Beside:
    """Plain text that is learned beside whatever the step is taken on, in an order of its own."""

    order: GlobalOrder
    rows: Rows
    weight: float


@dataclass(frozen=True)
class Feed:
    """Where the rows come from, in which order, and who writes them; without an author the data set does."""

    order: GlobalOrder
    training: Rows
    validation: Rows | None
    author: Author | None = None
    beside: Beside | None = None

    @property
    def most_streams(self) -> int:
        """The most streams that a step can have."""
        return (1 if self.author is None else self.author.most_streams) + (self.beside is not None)

    def turns(self, window: Window, rank: int, world_size: int) -> list[Turn]:
        """The turns of this rank: equally many on every rank and in every window, those without rows first."""
        share = self.order.share(window, rank, world_size)
        turns = [turn for each in self._streams(window, share, rank, world_size) for turn in each]
        idle = [Turn("dataset", self.training.batch(()), 0, True)] * (self.most_streams * len(share) - len(turns))
        empty = [turn for turn in turns if turn.everywhere_empty]
        # The ranks exchange gradients after the last one, so that must be a real one wherever there is one.
        return [*idle, *empty, *(turn for turn in turns if not turn.everywhere_empty)]

    def _streams(self, window: Window, share: list[MicroBatch], rank: int, world_size: int) -> Iterator[list[Turn]]:
        streams: list[tuple[Stream, float]] = [("dataset", 1.0)] if self.author is None else list(self.author.streams(window.step))
        if self.beside is not None:
            parts = self.beside.order.share(self.beside.order.window(window.step), rank, world_size)
            yield _turns("text", [self.beside.rows.batch(part.rows) for part in parts], parts, self.beside.weight, len(streams))
        for place, (stream, weight) in enumerate(streams):
            yield _turns(stream, self._written(stream, share, window.step), share, weight, place)

    def _written(self, stream: Stream, share: Sequence[MicroBatch], step: int) -> list[Batch]:
        """All micro-batches of a step are written together."""
        if stream == "dataset" or self.author is None:
            return [self.training.batch(part.rows) for part in share]
        written = iter(self.author.write(stream, [row for part in share for row in part.rows], step))
        return [self.training.collated([next(written) for _ in part.rows]) for part in share]


def _turns(stream: Stream, batches: Sequence[Batch], share: Sequence[MicroBatch], weight: float, place: int) -> list[Turn]:
    """The first stream of a step has the numbers that it would have alone, every other one numbers of its own."""
    numbers = [part.number if place == 0 else -(4 * part.number + place) for part in share]
    return [
        Turn(stream, batch, number, part.everywhere_empty, weight)
        for batch, number, part in zip(batches, numbers, share, strict=True)
    ]
