"""What a recipe says about data. Free of torch and transformers, so that a recipe is read and refused at once."""

from string import Formatter
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from potstill.config import Config

Format = Literal["instruct", "chat", "prompt_completion", "text"]
TooLong = Literal["error", "drop", "truncate_left", "truncate_right", "split"]

# The columns that a format reads. Every row has the required ones; the optional ones are used where they are there.
REQUIRED_COLUMNS: dict[str, tuple[str, ...]] = {
    "instruct": ("instruction", "input", "output"),
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "instruct": ("system", "finish_reason"),
    "chat": ("tools", "system", "finish_reason"),
    "prompt_completion": ("finish_reason",),
    "text": (),
}
# Columns that a recipe may declare absent with `columns: {input: null}`.
ABSENT_COLUMNS = ("input",)


def check_columns_mapping(format: str, columns: dict[str, str | None]) -> None:
    """Refuses a mapping that names a column which the format does not read."""
    known = REQUIRED_COLUMNS[format] + OPTIONAL_COLUMNS[format]
    for ours, theirs in columns.items():
        if ours not in known:
            raise ValueError(f"columns: the format {format} reads {', '.join(known)}, no {ours!r} (our name stands left, yours right)")
        if theirs is None and ours not in ABSENT_COLUMNS:
            raise ValueError(f"columns: {ours!r} cannot be null; only {', '.join(ABSENT_COLUMNS)} may be absent")


def wording_parts(wording: str) -> list[tuple[str, str | None]]:
    """A wording as pieces of text, each with the name in braces that follows it, if any. Raises ValueError where it does not read."""
    try:
        parts = list(Formatter().parse(wording))
    except ValueError as error:
        raise ValueError(f"{wording!r}: {error}; a name stands in braces, and a brace of the text is written twice: {{{{ or }}}}") from None
    for _, name, after, conversion in parts:
        if name is not None and (not name or after or conversion):
            raise ValueError(f"{wording!r}: braces hold the name of a column and nothing else; a brace of the text is written twice")
    return [(text, name) for text, name, _, _ in parts]


class SkipBadLines(Config):
    """Leave out up to `skip` bad lines, each counted and written to the reject file."""

    skip: Annotated[int, Field(ge=1)]


class MixtureItem(Config):
    """One source of a mixture."""

    path: str
    """A hub name or a local file."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Its share of the rows drawn, relative to the others' weights; without weights every row of every source is used."""
    format: Format | None = None
    """Where it differs from `data.format`."""
    columns: dict[str, str | None] | None = None
    """Where it differs from `data.columns`."""
    subset: str | None = None
    """The hub data set's configuration name."""
    split: str = "train"
    """The hub data set's split."""


class DataConfig(Config):
    """Which text, in which format, how long, and what becomes of rows that do not fit."""

    train: str | Annotated[list[MixtureItem], Field(min_length=1)]
    """A hub name, a local .jsonl, .jsonl.gz, .json, .parquet, .csv, .txt or .txt.gz, or a mixture of these."""
    validation: float | str | MixtureItem | None = None
    """A fraction of the training rows to hold out, or another hub name or file (or both with its split); nothing where null."""
    format: Format = "instruct"
    columns: dict[str, str | None] = Field(default={})
    """Our column's name -> the name in your files. `{input: null}` says that there is no such column."""
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    """The longest sequence; with packing, the length of a packed row."""
    too_long: TooLong = "error"
    """What becomes of a row with more than `max_tokens`. A cut answer gets no end-of-text token; `split` is for the format text."""
    packing: bool = True
    """Several documents in one row; positions restart at each, and models attend within a document alone."""
    chat_template: str | None = None
    """A named default (chatml, alpaca, plain) or a .jinja file, for a tokenizer without a template or in place of its own."""
    template_variables: dict[str, str | bool | int] = Field(default={})
    """Passed to the chat template, for instance `{date_string: "26 Jul 2024"}` or `{enable_thinking: false}`."""
    instruct_prompt: Literal["plain", "alpaca"] = "plain"
    """How instruction and input become a user turn: joined by an empty line, or in the wording of Stanford Alpaca."""
    teacher_prompt: Annotated[str, Field(min_length=1)] | None = None
    """What the teacher reads as the last user turn in place of the student's: a text with {prompt} (that turn), {answer} (the row's own
    answer) and any column in braces. Only the last answer is then learned. Null: the same as the student."""
    on_bad_line: Literal["stop"] | SkipBadLines = "stop"
    """Stop at the first malformed line, or leave out at most so many, each counted."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only so many training rows, drawn by the seed."""
    text_rows: Literal["line", "document"] = "line"
    """What one row of a .txt is: a line that is not blank, or the whole file."""

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise ValueError(f"validation: {self.validation} is no fraction between 0 and 1; give one, a file, or null")
        items = [] if isinstance(self.train, str) else self.train
        if isinstance(self.validation, MixtureItem) and self.validation.weight is not None:
            raise ValueError("validation: is one source, so a weight has no meaning there; remove it")
        for item in self.sources + ([self.held_out] if self.held_out else []):
            check_columns_mapping(item.format or self.format, self.columns if item.columns is None else item.columns)
        weighted = [item.weight is not None for item in items]
        if any(weighted) and not all(weighted):
            raise ValueError("train: give every source of the mixture a weight, or none")
        if self.too_long == "split" and any((item.format or self.format) != "text" for item in self.sources):
            raise ValueError("too_long: split is for the format text; an answer without its prompt teaches nothing, so drop or truncate")
        if self.teacher_prompt is not None:
            try:
                wording_parts(self.teacher_prompt)
            except ValueError as error:
                raise ValueError(f"teacher_prompt: {error}") from None
            if any((item.format or self.format) == "text" for item in self.sources + ([self.held_out] if self.held_out else [])):
                raise ValueError("teacher_prompt: takes the place of a user turn, and the format text has none; use prompt_completion")
        if self.instruct_prompt == "alpaca" and self.chat_template == "alpaca":
            raise ValueError("instruct_prompt: alpaca and chat_template: alpaca would write the Alpaca wording twice; choose one")
        return self

    @property
    def sources(self) -> list[MixtureItem]:
        """The training sources, one or several."""
        return [MixtureItem(path=self.train)] if isinstance(self.train, str) else list(self.train)

    @property
    def held_out(self) -> MixtureItem | None:
        """The validation source, where validation is one and no fraction."""
        if isinstance(self.validation, str):
            return MixtureItem(path=self.validation)
        return self.validation if isinstance(self.validation, MixtureItem) else None

    @property
    def bad_lines_allowed(self) -> int:
        return 0 if self.on_bad_line == "stop" else self.on_bad_line.skip


FORMATS: tuple[str, ...] = get_args(Format)
