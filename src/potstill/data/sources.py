"""Where rows come from: a hub data set, or a local file of lines, JSON, Parquet or CSV; and mixtures of these.

Knows how to read and how to draw; knows nothing of what a row means.
"""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from potstill.data.config import DataConfig, MixtureItem
from potstill.data.lines import (
    MAX_LINE_BYTES,
    Rejects,
    Row,
    RowFault,
    check_row,
    decode_line,
    numbered_lines,
    open_bytes,
    parse_json,
    parse_json_line,
)
from potstill.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".txt", ".txt.gz")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_source(item: MixtureItem, rejects: Rejects, text_rows: str = "line") -> list[Row]:
    """Every good row of one source, in its order; a bad one goes to `rejects`, which decides whether reading goes on."""
    path = Path(item.path).expanduser()
    if path.is_file():
        rows = list(_read_file(path, rejects, text_rows))
    elif path.is_dir():
        raise DataError(f"{item.path}: is a folder; name one file of {', '.join(SUFFIXES)}")
    elif item.path.endswith(SUFFIXES) or item.path.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(item.path):
        raise DataError(f"{item.path}: no such file")
    else:
        rows = list(_checked(item.path, enumerate(_read_hub(item), start=1), rejects))
    if not rows:
        raise DataError(f"{item.path}: holds no usable row" + (f" ({len(rejects.items)} bad ones)" if rejects.items else ""))
    return rows


def _read_file(path: Path, rejects: Rejects, text_rows: str) -> Iterator[Row]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _read_lines(path, rejects, parse_json_line)
    if name.endswith((".txt", ".txt.gz")):
        if text_rows == "document":
            return _read_document(path)
        return _read_lines(path, rejects, lambda line: check_row({"text": decode_line(line)}))
    if name.endswith(".json"):
        return _read_json(path, rejects)
    if name.endswith(".csv"):
        return _read_csv(path, rejects)
    if name.endswith(".parquet"):
        return _read_parquet(path, rejects)
    raise DataError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")


def _checked(path: Path | str, numbered: Iterator[tuple[int, Any]], rejects: Rejects) -> Iterator[Row]:
    for number, value in numbered:
        try:
            yield Row(check_row(value), str(path), number)
        except RowFault as fault:
            rejects.refuse(f"{path}:{number}", str(fault), repr(value)[:1000])


def _read_lines(path: Path, rejects: Rejects, parse) -> Iterator[Row]:
    for number, line in numbered_lines(path, rejects):
        try:
            yield Row(parse(line), str(path), number)
        except RowFault as fault:
            rejects.refuse(f"{path}:{number}", str(fault), line[:1000].decode(errors="backslashreplace"))


def _whole_text(path: Path) -> str:
    try:
        with open_bytes(path) as file:
            return decode_line(file.read()).removeprefix("\ufeff")
    except RowFault as fault:
        raise DataError(f"{path}: {str(fault).replace('of the line', 'of the file')}") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _read_document(path: Path) -> Iterator[Row]:
    try:
        yield Row(check_row({"text": _whole_text(path)}), str(path), 1)
    except RowFault as fault:
        raise DataError(f"{path}: {fault}") from None


def _read_json(path: Path, rejects: Rejects) -> Iterator[Row]:
    try:
        value = parse_json(_whole_text(path))
    except RowFault as fault:
        hint = "; one object a line is .jsonl: rename the file" if "Extra data" in str(fault) else ""
        raise DataError(f"{path}: {fault}{hint}") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: holds one {type(value).__name__}; a .json is one list of objects (one object a line is .jsonl)")
    yield from _checked(path, enumerate(value, start=1), rejects)


def _open_csv(path: Path):
    try:
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_csv(path: Path, rejects: Rejects) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # A byte that is not UTF-8 becomes a lone surrogate here, so that the row it stands in is refused, and only that row.
    with _open_csv(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header) or not header:
                raise DataError(f"{path}:1: the first line of a CSV names its columns, each once; found {header}")
            start = reader.line_num + 1
            for fields in reader:
                origin, start = f"{path}:{start}", reader.line_num + 1
                if not fields:
                    continue
                if len(fields) != len(header):
                    rejects.refuse(origin, f"{len(fields)} fields under {len(header)} columns", ",".join(fields))
                    continue
                try:
                    yield Row(check_row(dict(zip(header, fields, strict=True))), str(path), int(origin.rpartition(":")[2]))
                except RowFault as fault:
                    reason = re.sub(r"a lone surrogate \(U\+DC(..)\), which is no text", r"the byte 0x\1, which is not UTF-8", str(fault))
                    rejects.refuse(origin, reason, ",".join(fields))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not readable as CSV ({error})") from error


def _read_parquet(path: Path, rejects: Rejects) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                yield from _checked(path, enumerate(batch.to_pylist(), start=number + 1), rejects)
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]})") from error


def _read_hub(item: MixtureItem) -> list[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with cache_alone_without_network():
            data = datasets.load_dataset(item.path, name=item.subset, split=item.split)
    except (OSError, ValueError, DatasetsError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise DataError(f"{item.path}: neither a file here nor a data set that can be loaded from the hub "
                        f"({type(error).__name__}: {first}). Check the name, the split and the network") from error
    assert isinstance(data, datasets.Dataset)  # a split was named
    return data.to_list()


@contextmanager
def cache_alone_without_network() -> Iterator[None]:
    """Where the hub cannot be reached its client would try five times, with half a minute of waiting; the cache is asked at once."""
    from datasets import config
    from huggingface_hub import constants

    from potstill.hub import hub_is_reachable

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not hub_is_reachable():
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def draw_mixture(sizes: list[int], weights: list[float] | None, limit: int | None, seed: int) -> list[np.ndarray]:
    """For each source the rows that are used, ascending: no row twice, the shares of the rows drawn as the weights say.

    As many rows as the weights allow without a repetition (a row that is seen twice an epoch would be a silent change of the
    data); `limit` keeps the shares. Deterministic from `seed`.
    """
    if weights is None:
        shares = np.array(sizes, dtype=np.float64) / sum(sizes)
        total = sum(sizes)
    else:
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        total = int(np.floor(min(size / share for size, share in zip(sizes, shares, strict=True)) + 1e-9))
    total = total if limit is None else min(total, limit)
    counts = np.floor(shares * total + 1e-9).astype(np.int64)
    # Largest remainders first, so that the counts sum to the total and each differs from its share by less than one.
    for source in np.argsort(-(shares * total - counts), kind="stable")[: total - counts.sum()]:
        counts[source] += 1
    counts = np.minimum(counts, sizes)
    drawn = []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        generator = np.random.Generator(np.random.PCG64([seed, source]))
        drawn.append(np.arange(size) if count == size else np.sort(generator.permutation(size)[:count]))
    return drawn


def read_training_sources(config: DataConfig, rejects: Rejects, seed: int) -> list[tuple[MixtureItem, list[Row]]]:
    """The training sources with the rows drawn from each."""
    sources = [(item, read_source(item, rejects, config.text_rows)) for item in config.sources]
    weights = None if config.sources[0].weight is None else [item.weight or 0.0 for item in config.sources]
    drawn = draw_mixture([len(rows) for _, rows in sources], weights, config.limit, seed)
    if any(len(picked) == 0 for picked in drawn):
        empty = sources[[len(picked) for picked in drawn].index(0)][0].path
        raise DataError(f"{empty}: no row of it is drawn at these weights; give it a larger weight or larger sources beside it")
    return [(item, [rows[position] for position in picked]) for (item, rows), picked in zip(sources, drawn, strict=True)]
