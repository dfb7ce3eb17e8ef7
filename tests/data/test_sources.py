"""Every kind of file gives the same rows; mixtures draw by weight, each row once, the same for the same seed."""

import csv
import gzip
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.data.config import DataConfig, MixtureItem
from potstill.data.lines import Rejects
from potstill.data.sources import draw_mixture, read_source, read_training_sources
from potstill.errors import DataError

ROWS = [{"prompt": f'p{i}, with "quotes"\nand lines', "completion": f"Antwort {i} é漢🙂"} for i in range(5)]


def _write(path):
    name = path.name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    elif name.endswith(".csv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def _read(path, allowed=0):
    return read_source(MixtureItem(path=str(path)), Rejects(allowed))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    rows = _read(_write(tmp_path / f"rows{suffix}"))
    assert [row.values for row in rows] == ROWS
    assert rows[0].origin.startswith(str(tmp_path / f"rows{suffix}:"))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_text_by_line_and_as_one_document(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    text = "first\r\n\n  second é \nlast"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    assert [(row.number, row.values["text"]) for row in _read(path)] == [(1, "first"), (3, "  second é "), (4, "last")]
    assert [row.values["text"] for row in read_source(MixtureItem(path=str(path)), Rejects(), "document")] == [text]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "names its columns"),
        (b"a,a\n1,2\n", "each once"),
        (b'prompt,completion\n"a,b\n', "not readable as CSV"),
    ],
)
def test_a_csv_that_cannot_be_read(tmp_path, content, reason):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        _read(tmp_path / "rows.csv")


@pytest.mark.parametrize("bad", [b"only one", b"a,b,c", b"a,caf\xe9", b"a,b\x00c"])
def test_a_bad_csv_row_is_named_by_its_line_and_left_out(tmp_path, bad):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"two\r\nlines",x\r\n' + bad + b"\r\nc,d\r\n")
    with pytest.raises(DataError, match=r"rows\.csv:4: "):
        _read(path)
    assert [list(row.values.values()) for row in _read(path, allowed=1)] == [["two\r\nlines", "x"], ["c", "d"]]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.json", b'{"prompt": "a"}', "one list of objects"),
        ("rows.json", b'{"a": 1}\n{"a": 2}', r"\.jsonl"),
        ("rows.json", b"[{", "not valid JSON"),
        ("rows.json", b'["\xff"]', "UTF-8"),
        ("rows.parquet", b"PAR1 nothing", "Parquet"),
        ("rows.xlsx", b"PK", "unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_at_all(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
        _read(tmp_path / name)


def test_a_json_list_names_the_bad_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[0], "text", ROWS[1], {"prompt": "a\u0000", "completion": ""}]))
    with pytest.raises(DataError, match=r"rows\.json:2: the row is a string"):
        _read(path)
    assert [row.number for row in _read(path, allowed=2)] == [1, 3]


def test_a_missing_file_a_folder_and_a_hub_name_without_network(tmp_path):
    for path in (tmp_path / "no.jsonl", "./no", "no/such/file", "data set"):
        with pytest.raises(DataError, match="no such file"):
            _read(path)
    with pytest.raises(DataError, match="is a folder"):
        _read(tmp_path)


def test_a_hub_name_that_cannot_be_loaded_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(DataError, match="nobody/nothing-of-this-name: neither a file here nor a data set"):
        _read("nobody/nothing-of-this-name")


def test_without_a_network_a_hub_name_is_refused_at_once(monkeypatch):
    """Not told to be offline, on a machine where the hub's name does not resolve: the client must not go through its retries."""
    import datasets
    from huggingface_hub import constants

    from potstill import hub

    def unresolved(host, port):
        raise OSError("Name or service not known")

    told = []
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: told.append(constants.HF_HUB_OFFLINE) or load(*a, **k))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "getaddrinfo", unresolved)
    for name in hub._PROXIES:
        monkeypatch.delenv(name, raising=False)
    hub.hub_is_reachable.cache_clear()
    began = time.monotonic()
    try:
        with pytest.raises(DataError, match="nobody/nothing-of-this-name: neither a file here nor a data set"):
            _read("nobody/nothing-of-this-name")
    finally:
        hub.hub_is_reachable.cache_clear()
    assert told == [True]
    assert time.monotonic() - began < 10
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_data_set_is_asked_for_its_subset_and_split(monkeypatch):
    import datasets

    asked = []

    def load(path, **named):
        asked.append((path, named))
        return datasets.Dataset.from_list([*ROWS, {"prompt": "a\x00", "completion": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rejects = Rejects(allowed=1)
    rows = read_source(MixtureItem(path="someone/rows", subset="en", split="test"), rejects)
    assert asked == [("someone/rows", {"name": "en", "split": "test"})]
    assert [(row.origin, row.values) for row in rows] == [(f"someone/rows:{number}", row) for number, row in enumerate(ROWS, start=1)]
    assert rejects.items[0].origin == "someone/rows:6"


def test_mixture_weights_are_the_shares_of_the_rows_drawn():
    drawn = draw_mixture([1000, 300, 50], [6.0, 3.0, 1.0], None, seed=0)
    assert [len(rows) for rows in drawn] == [300, 150, 50]  # the smallest source is used whole and bounds the rest
    assert [len(rows) for rows in draw_mixture([1000, 300, 50], None, None, seed=0)] == [1000, 300, 50]
    assert [len(rows) for rows in draw_mixture([1000, 300, 50], [6.0, 3.0, 1.0], 10, seed=0)] == [6, 3, 1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=5),
    st.none() | st.integers(1, 800),
    st.integers(0, 5),
)
def test_mixture_laws(sources, limit, seed):
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    drawn = draw_mixture(sizes, weights, limit, seed)
    total = sum(len(rows) for rows in drawn)
    for rows, size, weight in zip(drawn, sizes, weights, strict=True):
        assert (np.diff(rows) > 0).all()  # no row twice
        assert len(rows) == 0 or (rows[0] >= 0 and rows[-1] < size)
        assert abs(len(rows) - total * weight / sum(weights)) <= 1  # the share, to a row
    assert limit is None or total <= limit
    again = draw_mixture(sizes, weights, limit, seed)
    assert all((one == two).all() for one, two in zip(drawn, again, strict=True))


def test_a_mixture_reads_each_source_in_its_own_format(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a{i}"}) + "\n" for i in range(40)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"b{i}"}) + "\n" for i in range(40)))
    config = DataConfig(
        train=[MixtureItem(path=str(tmp_path / "a.jsonl"), weight=3), MixtureItem(path=str(tmp_path / "b.jsonl"), weight=1)],
        format="text",
    )
    sources = read_training_sources(config, Rejects(), seed=1)
    assert [len(rows) for _, rows in sources] == [40, 13]
    assert read_training_sources(config, Rejects(), seed=1) == sources
    assert read_training_sources(config, Rejects(), seed=2) != sources
    heavy = config.model_copy(update={"train": [config.train[0].model_copy(update={"weight": 1000.0}), config.train[1]]})
    with pytest.raises(DataError, match="no row of it is drawn"):
        read_training_sources(heavy, Rejects(), seed=1)
