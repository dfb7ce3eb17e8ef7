"""A row names who answers it: the name follows the row through mixtures, cuts, splits and selections, or the row is refused."""

import json

import numpy as np
import pytest

from potstill.data.collation import collate
from potstill.data.config import DataConfig, MixtureItem
from potstill.data.prepare import prepare, split
from potstill.errors import DataError
from potstill.training.feeding import Rows
from tiny import tiny_tokenizer

NAMES = ("maths", "code")
ROWS = [
    {"instruction": f"Question {i}", "input": "", "output": f"Answer number {i}.", "teacher": NAMES[i % 3 == 0]} for i in range(12)
]


def _file(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def _prepare(config, **changes):
    return prepare(config, tiny_tokenizer(), seed=0, **{"route_column": "teacher", "routes": NAMES, **changes})


def _expected(example):
    return ROWS[int(example.origin.rpartition(":")[2]) - 1]["teacher"]


def test_every_example_has_the_name_of_its_row(tmp_path):
    examples = _prepare(DataConfig(train=_file(tmp_path, ROWS), max_tokens=256)).train
    assert [example.route for example in examples] == [row["teacher"] for row in ROWS]
    assert examples.route_counts == {"code": 4, "maths": 8}
    batch = collate([[examples[0], examples[1]], [examples[2]]], pad_token=0)
    assert batch.routes == tuple(document.route for document in batch.sequences()) == ("code", "maths", "maths")


def test_selections_and_splits_keep_it(tmp_path):
    data = _prepare(DataConfig(train=_file(tmp_path, ROWS), validation=0.3, max_tokens=256))
    assert data.validation is not None
    for part in (data.train, data.validation, *split(data.train, 0.5, 3), data.train[::-2], data.train.select([])):
        assert [part.route(i) for i in range(len(part))] == [example.route for example in part] == list(map(_expected, part))
        assert sum(part.route_counts.values()) == len(part)
    chosen = data.train.select(np.array([3, 1]))
    assert list(map(_expected, chosen)) == [example.route for example in chosen]


def test_pieces_and_other_sources_keep_it(tmp_path):
    long = [{"text": "x" * 40, "teacher": "code"}, {"text": "y", "teacher": "maths"}]
    config = DataConfig(train=_file(tmp_path, long), validation=_file(tmp_path, long[::-1], "held.jsonl"), format="text",
                        max_tokens=8, too_long="split")  # fmt: skip
    data = _prepare(config)
    assert [example.route for example in data.train] == ["code"] * (len(data.train) - 1) + ["maths"]
    assert data.validation is not None
    assert data.validation[0].route == "maths"
    halves = [MixtureItem(path=_file(tmp_path, ROWS[:6], "a.jsonl")), MixtureItem(path=_file(tmp_path, ROWS[6:], "b.jsonl"))]
    assert [example.route for example in _prepare(DataConfig(train=halves, max_tokens=256)).train] == [row["teacher"] for row in ROWS]


def test_without_a_column_there_are_no_names(tmp_path):
    examples = _prepare(DataConfig(train=_file(tmp_path, ROWS), max_tokens=256), route_column=None, routes=()).train
    assert {example.route for example in examples} == {""}
    assert collate([[examples[0]]], pad_token=0).routes == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "physics"}, r"rows\.jsonl:3: column 'teacher' is 'physics', which names nobody who answers; known are maths, code"),
        ({"teacher": None}, r"rows\.jsonl:3: column 'teacher' is 'None', which names nobody"),
        ({"teacher": ["maths"]}, r"rows\.jsonl:3: column 'teacher' is .*names nobody"),
        ({"teacher": ...}, r"rows\.jsonl:3: column 'teacher' is missing, which says who answers the row; known are maths, code"),
    ],
)
def test_a_row_that_names_nobody_is_refused_with_its_place(tmp_path, change, words):
    bad = {key: value for key, value in {**ROWS[2], **change}.items() if value is not ...}
    path = _file(tmp_path, [*ROWS[:2], bad, *ROWS[3:]])
    with pytest.raises(DataError, match=words):
        _prepare(DataConfig(train=path, max_tokens=256))
    data = _prepare(DataConfig(train=path, max_tokens=256, on_bad_line={"skip": 1}))
    assert data.counts.rejected == 1
    assert [example.route for example in data.train] == [row["teacher"] for row in ROWS[:2] + ROWS[3:]]
    with pytest.raises(DataError, match=words.replace("rows", "held")):
        _prepare(DataConfig(train=_file(tmp_path, ROWS), validation=_file(tmp_path, [*ROWS[:2], bad], "held.jsonl"), max_tokens=256))


def test_a_column_that_no_row_has_is_refused_at_once(tmp_path):
    path = _file(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"no column 'domain', .*\(maths, code\); the columns are input, instruction, output, teacher"):
        _prepare(DataConfig(train=path, max_tokens=256, on_bad_line={"skip": 99}), route_column="domain")


def test_another_name_is_another_data_set_to_a_resumed_run(tmp_path):
    config = DataConfig(train=_file(tmp_path, ROWS), max_tokens=256)
    other = DataConfig(train=_file(tmp_path, [{**ROWS[0], "teacher": "maths"}, *ROWS[1:]], "other.jsonl"), max_tokens=256)
    one, two, plain = (
        Rows(examples, pad_token=0, seed=0, max_tokens=None).fingerprint
        for examples in (_prepare(config).train, _prepare(other).train, _prepare(config, route_column=None).train)
    )
    assert len({one, two, plain}) == 3
