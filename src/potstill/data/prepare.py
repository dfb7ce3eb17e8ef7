"""From a DataConfig and a tokenizer to the examples of a run: read, check, render, cut, split, count.

The one place where the room's parts meet. It knows no model and no training.
"""

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from potstill import storage
from potstill.data.config import DataConfig, MixtureItem
from potstill.data.examples import DataCounts, ExampleSet, ExampleSetBuilder
from potstill.data.formats import Item, Reading, check_columns, is_unfinished, read_item
from potstill.data.lines import Rejects, Row, RowFault
from potstill.data.rendering import Rendered, Renderer
from potstill.data.routing import Routing
from potstill.data.sources import read_source, read_training_sources
from potstill.data.teacher_prompt import TeacherPrompt, cut_left
from potstill.data.templates import settle_template
from potstill.data.token_bytes import token_bytes
from potstill.errors import DataError

_ROWS_AT_ONCE = 1024
_WORTH_A_BAR = 5000


@dataclass(frozen=True)
class PreparedData:
    """The examples of a run. `validation_counts` is None where the validation rows were held out of the training rows."""

    train: ExampleSet
    validation: ExampleSet | None
    counts: DataCounts
    validation_counts: DataCounts | None = None
    shared_rows: int = 0
    """Validation examples whose tokens and marks also stand in the training set."""
    problems: list[str] = field(default_factory=list)
    """What would have been refused; empty unless asked with `strict=False`."""


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    end_of_text: Sequence[int] = (),
    progress: bool | None = None,
    rejects_file: Path | None = None,
    strict: bool = True,
    route_column: str | None = None,
    routes: Collection[str] = (),
) -> PreparedData:
    """Reads and renders everything that `config` names, deterministically from `seed`.

    The tokenizer gets the named chat template, if one is named. `end_of_text`: further ids at which the model stops.
    `progress`: a bar on stderr; by default if it is a terminal. `rejects_file`: where bad lines are written, one JSON a line.
    With `strict=False` what is too long or without targets is returned in `problems`, for a look before a run.
    `route_column`: the column that names, for each row, which of `routes` answers it. Raises DataError.
    """
    preparation = _Preparation(config, tokenizer, end_of_text, progress, strict, Routing.of(route_column, routes))
    try:
        return _prepare(preparation, config, seed)
    finally:
        preparation.write_rejects(rejects_file)


def _prepare(preparation: "_Preparation", config: DataConfig, seed: int) -> PreparedData:
    sources = read_training_sources(config, preparation.rejects, seed)
    sources = [(item, preparation.checked(item, rows)) for item, rows in sources]
    held_out = None
    if config.held_out is not None:
        rows = read_source(config.held_out, preparation.validation_rejects, config.text_rows)
        held_out = (config.held_out, preparation.checked(config.held_out, rows, validation=True))
    train, counts = preparation.examples(sources, "data.train", preparation.rejects)
    validation, validation_counts, shared = None, None, 0
    if held_out is not None:
        validation, validation_counts = preparation.examples([held_out], "data.validation", preparation.validation_rejects)
        seen = {train.digest(i) for i in range(len(train))}
        shared = sum(validation.digest(i) in seen for i in range(len(validation)))
    elif isinstance(config.validation, float) and len(train):
        train, validation = split(train, config.validation, seed)
    return PreparedData(train, validation, counts, validation_counts, shared, preparation.problems)


def split(examples: ExampleSet, fraction: float, seed: int) -> tuple[ExampleSet, ExampleSet]:
    """(train, validation): a seeded fraction held out. Equal rows and the pieces of one row stay together, so that no validation
    row is trained on."""
    groups: dict[bytes, list[int]] = {}
    for pieces in examples.rows:
        groups.setdefault(b"".join(map(examples.digest, pieces)), []).extend(pieces)
    if len(groups) < 2:
        raise DataError(f"data.validation: {fraction} cannot be held out of {len(examples)} usable rows of which {len(groups)} differ; "
                        "give more rows, a validation file, or null")
    wanted = max(1, round(fraction * len(examples)))
    members = list(groups.values())
    held: list[int] = []
    order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(len(members))
    for number in order[:-1]:  # one group at least stays to be trained on
        if len(held) >= wanted:
            break
        held += members[number]
    kept = np.ones(len(examples), dtype=bool)
    kept[held] = False
    return examples.select(np.flatnonzero(kept)), examples.select(np.sort(held))


class _Preparation:
    """What reading and rendering of all sources share."""

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, end_of_text: Sequence[int], progress: bool | None, strict: bool,
        routing: Routing | None,
    ):  # fmt: skip
        self.config, self.tokenizer, self.strict, self.routing = config, tokenizer, strict, routing
        self.progress, self.teacher_prompt = progress, TeacherPrompt.of(config.teacher_prompt)
        self.rejects = Rejects(config.bad_lines_allowed)
        self.validation_rejects = Rejects(config.bad_lines_allowed)
        self.problems: list[str] = []
        every = [*config.sources, *([config.held_out] if config.held_out else [])]
        if any((item.format or config.format) in ("instruct", "chat") for item in every):
            settle_template(tokenizer, config.chat_template)
        self.renderer = Renderer(tokenizer, end_of_text=end_of_text, template_variables=config.template_variables)
        self.bytes_of = token_bytes(tokenizer)

    def reading(self, item: MixtureItem) -> Reading:
        config = self.config
        return Reading(item.format or config.format, config.columns if item.columns is None else item.columns, config.instruct_prompt)

    def checked(self, item: MixtureItem, rows: list[Row], validation: bool = False) -> list[Row]:
        rejects = self.validation_rejects if validation else self.rejects
        rows = check_columns(rows, self.reading(item), item.path, rejects)
        for further in (self.teacher_prompt, self.routing):
            rows = rows if further is None else further.checked(rows, item.path, rejects)
        return rows

    def write_rejects(self, path: Path | None) -> None:
        items = [*self.rejects.items, *self.validation_rejects.items]
        if path is not None and items:
            storage.write_text(path, "".join(item.as_json() + "\n" for item in items))

    def refuse(self, message: str) -> None:
        if self.strict:
            raise DataError(message)
        self.problems.append(message)

    def examples(self, sources: list[tuple[MixtureItem, list[Row]]], key: str, rejects: Rejects) -> tuple[ExampleSet, DataCounts]:
        """The examples of these sources and what became of their rows."""
        builder = ExampleSetBuilder(self.bytes_of)
        tally = _Tally()
        for (row, rendered) in self._rendered(sources, tally, rejects):
            self._add(row, rendered, builder, tally)
        examples = builder.build()
        counts = DataCounts(
            # Rows that were refused while reading are no rows any more; those refused while rendering still are.
            rows=sum(len(rows) for _, rows in sources) + len(rejects.items) - tally.rejected_late,
            used=tally.used, examples=len(examples), empty=tally.empty, unfinished=tally.unfinished, too_long=len(tally.too_long),
            dropped=tally.dropped, truncated=tally.truncated, rejected=len(rejects.items), unended=tally.unended,
            tokens=examples.num_tokens, target_tokens=examples.num_targets, longest=tally.longest,
        )
        self._check(key, counts, tally)
        return examples, counts

    def _rendered(self, sources: list[tuple[MixtureItem, list[Row]]], tally: "_Tally", rejects: Rejects) -> Iterator[tuple[Row, Rendered]]:
        total = sum(len(rows) for _, rows in sources)
        # A bar that appears and is gone at once would be noise, unless it was asked for.
        hidden = not (self.progress if self.progress is not None else sys.stderr.isatty() and total >= _WORTH_A_BAR)
        with Progress(console=Console(stderr=True), disable=hidden) as bar:
            task = bar.add_task("Preparing rows", total=total)
            for item, rows in sources:
                reading = self.reading(item)
                for start in range(0, len(rows), _ROWS_AT_ONCE):
                    chunk = rows[start : start + _ROWS_AT_ONCE]
                    items: list[Item | RowFault] = [_read(row, reading) for row in chunk]
                    pairs = [(row, item) for row, item in zip(chunk, items, strict=True) if not isinstance(item, RowFault)]
                    results = iter(self._render(pairs))
                    for row, content in zip(chunk, items, strict=True):
                        result = content if isinstance(content, RowFault) else next(results)
                        if isinstance(result, RowFault):
                            tally.rejected_late += 1
                            rejects.refuse(row.origin, str(result), repr(row.values)[:1000])
                        elif is_unfinished(row, reading):
                            tally.unfinished += 1
                        elif not result.spans:
                            tally.empty += 1
                        else:
                            yield row, result
                    bar.advance(task, len(chunk))

    def _render(self, pairs: list[tuple[Row, Item]]) -> list[Rendered | RowFault]:
        if self.teacher_prompt is not None:
            return self.teacher_prompt.render(self.renderer, pairs)
        return self.renderer.render([item for _, item in pairs])

    def _add(self, row: Row, rendered: Rendered, builder: ExampleSetBuilder, tally: "_Tally") -> None:
        limit = self.config.max_tokens
        route = "" if self.routing is None else self.routing.route(row)
        tally.longest = max(tally.longest, rendered.longest)
        if rendered.longest > limit:
            tally.too_long.append((rendered.longest, row.origin))
            if self.config.too_long in ("error", "drop"):
                tally.dropped += 1
                return
            if self.config.too_long == "split":
                tally.used += 1
                for piece, inside in _pieces(rendered.tokens, rendered.spans, limit):
                    builder.add(piece, inside, row.source, row.number, route)
                return
            rendered = self._cut(rendered, limit)
            if not rendered.spans:
                tally.empty += 1
                return
            tally.truncated += 1
        elif rendered.tokens[rendered.spans[-1][1] - 1] not in self.renderer.ending_ids:
            tally.unended += 1
        tally.used += 1
        builder.add(rendered.tokens, rendered.spans, row.source, row.number, route, rendered.teacher_prompt)

    def _cut(self, whole: Rendered, limit: int) -> Rendered:
        """At most `limit` tokens, for the teacher too; nothing is added, so that a cut answer does not end. A BOS stays in front."""
        bos = self.tokenizer.bos_token_id
        if self.config.too_long == "truncate_right":  # the same answer stands behind the teacher's prompt
            kept, shift, front = whole.tokens[: max(limit - whole.ahead, 0)], 0, 0
        else:
            kept, shift, front = cut_left(whole.tokens, limit, bos), max(len(whole.tokens) - limit, 0), int(whole.tokens[0] == bos)
        moved = [(max(start - shift, front), min(end - shift, len(kept))) for start, end in whole.spans]
        # A target in first place has no predictor: what is left must hold one that has.
        spans = [(start, end) for start, end in moved if end > max(start, 1)]
        if whole.teacher_prompt is None or not spans:
            return Rendered(kept, spans)
        start = whole.spans[-1][0] - shift
        if start < max(front, 1):
            return Rendered(kept, [])  # no prompt is left whose place the teacher's could take
        return Rendered(kept, spans, cut_left(whole.teacher_prompt, limit - len(kept) + start, bos))

    def _check(self, key: str, counts: DataCounts, tally: "_Tally") -> None:
        if tally.too_long and self.config.too_long == "error":
            length, origin = max(tally.too_long)
            self.refuse(
                f"{key}: {len(tally.too_long)} of {counts.rows} rows have more than data.max_tokens = {self.config.max_tokens} tokens, "
                f"the longest {length} ({origin}). Raise data.max_tokens, or set data.too_long: drop, truncate_left or truncate_right"
            )
        elif counts.used == 0:
            what = {"empty": counts.empty, "unfinished": counts.unfinished, "too long": counts.dropped, "rejected": counts.rejected}
            why = ", ".join(f"{number} {name}" for name, number in what.items() if number)
            self.refuse(
                f"{key}: 0 of {counts.rows} rows have target tokens ({why}). Training needs answers (in a chat, turns of the role "
                f"assistant): look at data.format = {self.config.format}, data.columns and data.max_tokens"
            )


def _pieces(
    tokens: list[int], spans: list[tuple[int, int]], limit: int
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Pieces of `limit` tokens; each begins with the last token of the one before, so that each but the very first is predicted once."""
    for first in range(0, max(len(tokens) - 1, 1), limit - 1):
        piece = tokens[first : first + limit]
        inside = [(max(start - first, 0), min(end - first, len(piece))) for start, end in spans]
        yield piece, [(start, end) for start, end in inside if end > start]


@dataclass
class _Tally:
    used: int = 0
    empty: int = 0
    unfinished: int = 0
    unended: int = 0
    dropped: int = 0
    truncated: int = 0
    longest: int = 0
    rejected_late: int = 0
    too_long: list[tuple[int, str]] = field(default_factory=list)


def _read(row: Row, reading: Reading) -> Item | RowFault:
    try:
        return read_item(row, reading)
    except RowFault as fault:
        return fault
