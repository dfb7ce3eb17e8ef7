"""`potstill generate` through the command line: rows with a model's answers, in every format, filtered, once, and ready to train from."""

import datetime
import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bigram_model import save_bigram
from potstill.recipes.read import read_recipe
from potstill.rollouts.local import LocalGenerator
from potstill.run_folder import RunFolder
from small_recipe import potstill
from tiny import save_pair

RECIPE = """student: {{path: {folder}/student}}
teacher: {{path: {folder}/teacher}}
data: {{train: {folder}/rows.jsonl, max_tokens: 96}}
training: {{steps: 2, batch_size: 2, learning_rate: 1e-3, precision: float32}}
run: {{folder: {folder}/run}}
generate: {{path: {folder}/out.jsonl, batch_size: 4, sampling: {{max_new_tokens: 6}}}}
"""
ROWS = [
    {"instruction": f"Add {a} and {b}", "input": "", "output": f"It is {a + b}. Answer: {a + b}", "kind": "sum", "finish_reason": "length"}
    for a, b in [(40, 2), (40, 5), (1, 1), (41, 1), (2, 2), (20, 22), (3, 3)]
]
# All that the teacher can say in six tokens that end, as texts.
SAYS = {"The answer.", "42", "45"} | {"The answer" + " 42" * n for n in (1, 2, 3)} | {" 42" * n for n in (1, 2, 3, 4, 5)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_bigram(folder / "teacher")
    save_pair(folder / "student", 0)
    return folder


@pytest.fixture
def place(models, tmp_path) -> Path:
    """A folder with `r.yaml`, `rows.jsonl` and its models."""
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(models / name)
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "r.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def generate(place: Path, *overrides: str) -> int:
    return potstill("generate", place / "r.yaml", "--quiet", *overrides)


def out(place: Path, name: str = "out.jsonl") -> list[dict]:
    data = (place / name).read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if name.endswith(".gz") else data).splitlines()]


def counts(place: Path, name: str = "out.jsonl") -> dict:
    return json.loads((place / f"{name}.counts.json").read_text())


# ---------------------------------------------------------------- rows


def test_every_row_gets_the_answer_and_keeps_the_rest(place, capsys):
    settings = ["generate.samples=2", "generate.filters={cut: keep, same: keep}", "generate.sampling={max_new_tokens: 3}"]
    assert generate(place, *settings) == 0
    rows = out(place)
    assert [row["sample"] for row in rows] == [0, 1] * len(ROWS)
    for row, source in zip(rows, [row for row in ROWS for _ in range(2)], strict=True):
        assert {**row, "output": "", "finish_reason": ""} == {**source, "output": "", "finish_reason": "", "sample": row["sample"]}
        assert row["finish_reason"] == ("length" if row["output"] in ("The answer.", "The answer 42", " 42 42 42") else "stop")
        assert row["output"] in SAYS
    said = counts(place)
    assert (said["rows"], said["prompts"], said["answers"], said["kept"]) == (7, 7, 14, 14)
    assert 0 < said["cut"] == sum(row["finish_reason"] == "length" for row in rows) < 14
    assert "14 of 14 answers to 7 prompts kept" in capsys.readouterr().out


def test_answers_are_drawn_from_the_teacher_and_another_seed_draws_others(place):
    settings = ["generate.samples=40", "generate.filters={cut: keep, same: keep}"]
    assert generate(place, *settings) == 0
    first = Counter("The" if row["output"].startswith("The") else row["output"].strip()[0] for row in out(place))
    # 280 draws of one half: 140 +- 8.4.
    assert abs(first["The"] - 140) < 4 * 8.4
    assert first["The"] + first["4"] == 280
    assert generate(place, *settings, "run.seed=1", f"generate.path={place}/other.jsonl") == 0
    assert out(place, "other.jsonl") != out(place)


def test_the_text_does_not_depend_on_what_is_written_side_by_side(place):
    assert generate(place, "generate.samples=3") == 0
    assert generate(place, "generate.samples=3", "generate.batch_size=1", f"generate.path={place}/alone.jsonl.gz") == 0
    assert out(place) == out(place, "alone.jsonl.gz")
    raw = (place / "alone.jsonl.gz").read_bytes()
    assert generate(place, "generate.samples=3", f"generate.path={place}/alone.jsonl.gz") == 0
    assert (place / "alone.jsonl.gz").read_bytes() == raw


def test_the_most_likely_answer(place):
    assert generate(place, "generate.sampling.temperature=0") == 0
    assert {row["output"] for row in out(place)} == {"The answer."}


def test_text_that_reads_as_other_tokens_is_kept_and_counted(place):
    assert generate(place, "generate.samples=8", "generate.filters.same=keep") == 0
    rows = out(place)
    # "4", "2" were drawn, and the tokenizer has a token for 42.
    assert counts(place)["kept_but_read_otherwise"] == sum(row["output"] == "42" for row in rows) > 0


PROMPTS = "The quick brown fox\n"
FORMATS = {
    "chat": ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
                            {"role": "assistant", "content": "old"}], "id": 7}], lambda row: row["messages"][-1]["content"]),
    "chat without an answer": ([{"messages": [{"role": "user", "content": "a"}]}], lambda row: row["messages"][-1]["content"]),
    "chat as text": ([{"messages": json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])}],
                     lambda row: json.loads(row["messages"])[-1]["content"]),
    "prompt_completion": ([{"prompt": PROMPTS, "completion": "old"}], lambda row: row["completion"]),
    "prompt_completion without an answer": ([{"prompt": PROMPTS}], lambda row: row["completion"]),
    "instruct without an answer": ([{"instruction": "a", "input": ""}], lambda row: row["output"]),
    "text": ([{"text": "The\n tail that is no prompt"}], lambda row: row["text"].removeprefix("The\n")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_of_every_format_is_trained_from_at_once(name, place, capsys):
    rows, answer = FORMATS[name]
    write(place / "rows.jsonl", rows)
    form = name.split()[0]
    settings = [f"data.format={form}", *(["generate.prompt_tokens=2"] if form == "text" else [])]
    assert generate(place, *settings, "generate.samples=6") == 0
    written = out(place)
    assert {answer(row) for row in written} <= SAYS
    assert len(written) > 1
    for row in written:
        assert {**row, **rows[0]}.keys() - rows[0].keys() <= {"sample", "finish_reason", "completion", "output"}
        if "messages" in row and not isinstance(row["messages"], str):
            kept = [message for message in rows[0]["messages"] if message["content"] != "old"]
            assert row["messages"][:-1] == kept
    arguments = [f"data.format={form}", f"data.train={place}/out.jsonl", "teacher=null", "data.packing=false"]
    assert potstill("check", place / "r.yaml", *arguments) == 0
    assert potstill("finetune", place / "r.yaml", "--quiet", *arguments) == 0
    assert RunFolder.read(place / "run").read_summary()["data"]["used"] == len(written)


def test_the_teacher_reads_its_own_prompt_and_the_row_keeps_the_students(place, tmp_path):
    """Here the teacher answers what stands before the header's end: nothing of its wording reaches the data set."""
    told = ["data.teacher_prompt='{prompt} The answer is {answer}'"]
    assert generate(place, *told) == 0
    stated = json.loads((place / "out.jsonl.answers" / "provenance.json").read_text())
    assert generate(place, f"generate.path={place}/plain.jsonl") == 0
    plain = json.loads((place / "plain.jsonl.answers" / "provenance.json").read_text())
    assert stated["prompts"]["digest"] != plain["prompts"]["digest"]
    assert "The answer is It is" not in (place / "out.jsonl").read_text()
    assert [row["instruction"] for row in out(place)] == [row["instruction"] for row in out(place, "plain.jsonl")]


TURNS = (
    "{%- for m in messages %}{%- if m['role'] == 'assistant' %}{% generation %}{{- ' ' + m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- 'User: ' + m['content'] + '\\nBot:' }}{%- endif %}{%- endfor %}"
)


def test_a_template_decides_what_ends_an_answer_and_which_blank_begins_it(place, models):
    """The turn ends with a token that is no EOS, and the template itself writes the blank that the model's first token has."""
    shutil.copytree(models / "teacher", place / "other")
    save_bigram(place / "other", {":": {" answer": 1.0}, " answer": {".": 1.0}})
    (place / "turns.jinja").write_text(TURNS)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        text = (place / "other" / name).read_text()
        text = text.replace('"eos_token_id": 2', '"eos_token_id": 0').replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
        (place / "other" / name).write_text(text)
    settings = [f"data.chat_template={place}/turns.jinja", f"teacher.path={place}/other", f"data.train={place}/plain.jsonl"]
    write(place / "plain.jsonl", [{key: row[key] for key in ("instruction", "input", "output")} for row in ROWS])
    assert generate(place, *settings) == 0
    assert {row["output"] for row in out(place)} == {"answer."}
    assert counts(place)["kept_but_read_otherwise"] == 0


# ---------------------------------------------------------------- filters


def test_filters_drop_what_they_say_and_keep_it_apart(place, capsys):
    settings = ["generate.samples=8", f"generate.dropped={place}/dropped.jsonl"]
    assert generate(place, *settings, "generate.filters={checker: numeric, most: 1}") == 0
    rows, dropped, said = out(place), out(place, "dropped.jsonl"), counts(place)
    assert len(rows) + len(dropped) == 56 == said["answers"]
    assert Counter(row["dropped"] for row in dropped) == {reason: n for reason, n in said["dropped"].items() if n}
    assert {row["instruction"] for row in rows} <= {"Add 40 and 2", "Add 40 and 5", "Add 41 and 1", "Add 20 and 22"}
    assert all(row["output"].split()[-1] == ROWS_BY[row["instruction"]] for row in rows)
    assert len({row["instruction"] for row in rows}) == len(rows) == 7 - said["prompts_without_an_answer"] > 1
    assert "left out: " in capsys.readouterr().out


ROWS_BY = {row["instruction"]: row["output"].split()[-1] for row in ROWS}


def test_other_filters_and_fewer_samples_ask_nothing_again(place, monkeypatch):
    assert generate(place, "generate.samples=4") == 0
    everything = counts(place)
    monkeypatch.setattr(LocalGenerator, "generate", lambda *_: pytest.fail("an answer was asked for again"))
    assert generate(place, "generate.samples=4", "generate.filters.max_tokens=2") == 0
    assert counts(place)["dropped"]["long"] > 0
    assert generate(place, "generate.samples=2") == 0
    assert [row for row in out(place) if row["sample"] < 2] == out(place)
    assert generate(place, "generate.samples=4") == 0
    assert counts(place) == everything


def test_more_samples_keep_those_that_are_there(place):
    assert generate(place, "generate.samples=2", "generate.filters.same=keep") == 0
    two = out(place)
    assert generate(place, "generate.samples=5", "generate.filters.same=keep") == 0
    assert [row for row in out(place) if row["sample"] < 2] == two


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "generate=null": "generate: missing; say where the answers go",
    "teacher=null": "generate.author: teacher, and there is no teacher section",
    "generate.path=PLACE/out.txt": "generate.path: PLACE/out.txt: answers are written as .jsonl or .jsonl.gz",
    "generate.path=PLACE/rows.jsonl": "is read as data.train, and would be overwritten",
    "generate.dropped=PLACE/out.jsonl": "generate.dropped: the same file as generate.path",
    "generate.sampling={temperature: 0}": "fit into data.max_tokens",
    "generate.sampling={temperature: 0, max_new_tokens: 6} generate.samples=2": "generate.samples: 2 answers to a prompt are all the same",
    "generate.filters.min_tokens=9": "generate.filters.min_tokens: 9 is more than an answer can have",
    "generate.filters.checker=exakt": "there is exact, contains, numeric, choice, math",
    "generate.filters.checker=PLACE/no.py:right": "generate.filters.checker",
    "generate.prompt_tokens=4": "generate.prompt_tokens: is for the format text",
    "data.format=text data.columns={text: instruction}": "generate.prompt_tokens: rows of the format text have no prompt",
    "data.columns={instruction: instructions}": "no column 'instructions'",
    "teacher.path=PLACE/gone": "teacher.path: PLACE/gone: no such folder",
    "generate.smaples=2": "did you mean samples",
    "teacher={kind: server, url: 'http://127.0.0.1:1', model: m, backend: sglang}": "teacher.backend: sglang is not asked to write",
    "data.max_tokens=20": "prompts leave no room for generate.sampling.max_new_tokens = 6 within data.max_tokens = 20",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_a_weight_is_read(overrides, place, capsys, monkeypatch):
    monkeypatch.setattr("potstill.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    found = overrides.replace("PLACE", str(place))
    arguments = [found] if found.startswith("teacher={") else _split(found)
    assert generate(place, *arguments) == 2
    said = capsys.readouterr().err
    assert REFUSED[overrides].replace("PLACE", str(place)) in said
    assert len(said.splitlines()) == 1
    assert not (place / "out.jsonl").exists()


def _split(overrides: str) -> list[str]:
    """At blanks that stand before a key."""
    parts: list[str] = []
    for word in overrides.split(" "):
        if not parts or ("=" in word and "." in word.split("=")[0]):
            parts.append(word)
        else:
            parts[-1] += " " + word
    return parts


def test_wrong_usage_imports_no_torch(place):
    script = "import sys\nfrom potstill.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, "generate", str(place / "r.yaml"), "teacher=null"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr


def test_a_checker_needs_the_rows_own_answers(place, capsys):
    write(place / "rows.jsonl", [ROWS[0], {**ROWS[1], "output": ""}])
    assert generate(place, "generate.filters.checker=numeric") == 2
    assert "1 of 2 rows have none, the first is" in capsys.readouterr().err
    (place / "mine.py").write_text("def right(answer, reference, row):\n    return row['kind'] == 'sum' and 'answer' in answer\n")
    assert generate(place, f"generate.filters.checker={place}/mine.py:right", "generate.samples=6") == 0
    assert all("answer" in row["output"] for row in out(place))


def test_prompts_without_room_are_left_out_where_the_recipe_says_so(place):
    write(place / "rows.jsonl", [*ROWS, {**ROWS[0], "instruction": "many words " * 20}])
    assert generate(place, "data.too_long=drop", "generate.filters.cut=keep") == 0
    assert (counts(place)["prompts_too_long"], len(out(place))) == (1, 7)


def test_a_column_that_no_line_of_json_holds_is_named_before_anything_is_asked(place, capsys):
    table = pyarrow.table({key: [row[key] for row in ROWS] for key in ("instruction", "input", "output")})
    dates = pyarrow.array([datetime.date(2026, 1, 1)] * len(ROWS))
    pyarrow.parquet.write_table(table.append_column("day", dates), place / "rows.parquet")
    assert generate(place, f"data.train={place}/rows.parquet") == 2
    assert "rows.parquet:1: column 'day' holds a value (date)" in capsys.readouterr().err
    pyarrow.parquet.write_table(table, place / "rows.parquet")
    assert generate(place, f"data.train={place}/rows.parquet", "generate.filters.cut=keep") == 0
    assert len(out(place)) == len(ROWS)


OTHERS = {
    "sampling.temperature": ["generate.sampling={temperature: 0.5, max_new_tokens: 6}"],
    "run.seed": ["run.seed=3"],
    "author": ["generate.author=student"],
    "prompts.number": ["data.limit=3"],
    "writer weights": ["teacher.path=PLACE/other"],
}


@pytest.mark.parametrize("field", OTHERS)
def test_answers_of_something_else_are_not_mixed_in(field, place, capsys):
    assert generate(place) == 0
    before = (place / "out.jsonl").read_bytes()
    if field == "writer weights":
        save_bigram(place / "other", {"\n": {".": 1.0}})
    capsys.readouterr()
    assert generate(place, *(override.replace("PLACE", str(place)) for override in OTHERS[field])) == 2
    said = capsys.readouterr().err
    assert "its answers were made from something else" in said
    assert field in said
    assert (place / "out.jsonl").read_bytes() == before


def test_another_path_of_the_same_teacher_is_accepted(place, models):
    assert generate(place) == 0
    shutil.copytree(models / "teacher", place / "moved")
    assert generate(place, f"teacher.path={place}/moved") == 0


def test_a_file_that_no_generation_wrote_is_not_overwritten(place, capsys):
    (place / "out.jsonl").write_text("mine\n")
    assert generate(place) == 2
    assert "potstill generate did not write it" in capsys.readouterr().err
    assert (place / "out.jsonl").read_text() == "mine\n"


# ---------------------------------------------------------------- the whole way


def test_sequence_level_distillation_end_to_end(place):
    """The student learns what the teacher wrote: generate, then finetune, by two commands."""
    assert generate(place, "generate.sampling.temperature=0.01") == 0
    arguments = ["teacher=null", f"data.train={place}/out.jsonl", "training.steps=40", "training.learning_rate=1e-2", "data.packing=false",
                 "training.logging_steps=1"]  # fmt: skip
    assert potstill("finetune", place / "r.yaml", "--quiet", *arguments) == 0
    losses = [line["loss"] for line in RunFolder.read(place / "run").read_metrics() if "loss" in line]
    assert losses[-1] < 0.2 < losses[0]
    # And the student itself can be asked: it says what it was taught.
    own = ["generate.author=student", f"student.path={place}/run/student", f"generate.path={place}/own.jsonl"]
    assert generate(place, *own, "generate.sampling={temperature: 0, max_new_tokens: 6}") == 0
    assert {row["output"] for row in out(place, "own.jsonl")} == {"The answer."}


def test_a_recipe_may_hold_the_section_and_train_without_it(place):
    write(place / "rows.jsonl", [{key: row[key] for key in ("instruction", "input", "output")} for row in ROWS])
    assert read_recipe(str(place / "r.yaml")).generate is not None
    assert potstill("distill", place / "r.yaml", "--quiet", "training.steps=1") == 0


@pytest.mark.slow
def test_two_ranks_share_the_rows_and_write_the_file_of_one(place):
    assert generate(place, "generate.samples=3") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "potstill", "generate",
               str(place / "r.yaml"), "generate.samples=3", f"generate.path={place}/ranks.jsonl"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (place / "ranks.jsonl").read_bytes() == (place / "out.jsonl").read_bytes()
    assert len(list((place / "ranks.jsonl.answers").glob("answers-000[01]-of-0002-*.jsonl"))) == 2
    assert done.stdout.count("answers to 7 prompts kept") == 1
