"""Questions and samples on real small models: prompts are those of training, answers hang on no batch, numbers are known beforehand."""

import json
from math import log
from pathlib import Path

import numpy as np
import pytest

from bigram_model import END, NEXT, save_bigram
from potstill.cli import main
from potstill.data import tasks
from potstill.data.config import DataConfig
from potstill.data.prepare import prepare
from potstill.errors import ConfigError, DataError
from potstill.evaluation.asked_rows import read_rows
from potstill.evaluation.config import EvaluationConfig
from potstill.evaluation.evaluate import evaluate
from potstill.evaluation.exact_match import Question, exact_match
from potstill.evaluation.questions_config import QuestionsTaskConfig
from potstill.evaluation.questions_task import QuestionsTask
from potstill.evaluation.samples_config import SamplesTaskConfig
from potstill.evaluation.samples_task import SamplesTask
from potstill.evaluation.task import Outcome, Subject
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.models.loading import load_model, load_tokenizer
from tiny import save_pair, tiny_tokenizer

ROWS = 40


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that writes by a table, one of random weights, rows, and a checker that calls about half of all answers right."""
    place = tmp_path_factory.mktemp("written")
    save_bigram(place / "bigram")
    save_pair(place / "random", 1)
    write(place / "rows.jsonl", [{"instruction": f"Say {n}", "input": "", "output": "42" if n % 2 else "It is 7."} for n in range(ROWS)])
    (place / "mine.py").write_text(
        "import hashlib\n"
        "def half(answer, reference, row):\n"
        "    return hashlib.blake2b((answer + row['instruction']).encode()).digest()[0] < 128\n"
        "def broken(answer, reference, row):\n    return 1 / (len(answer) - len(reference))\n"
        "def always(answer, reference, row):\n    return True\n"
        "from potstill.data import tasks\n"
        "def solved(answer, reference, row):\n    return tasks.check({name: str(value) for name, value in row.items()}, answer)\n"
    )
    return place


def questions(folder, **changes) -> QuestionsTaskConfig:
    values = {"kind": "questions", "data": {"train": str(folder / "rows.jsonl"), "max_tokens": 200}, "max_new_tokens": 12}
    return QuestionsTaskConfig.model_validate(values | changes)


def samples(folder, **changes) -> SamplesTaskConfig:
    data = {"train": str(folder / "rows.jsonl"), "max_tokens": 200}
    values = {"kind": "samples", "data": data, "max_new_tokens": 12, "budget": 20, "prompt_budget": 2}
    return SamplesTaskConfig.model_validate(values | changes)


def subject(folder, name="bigram", batch_size=8) -> Subject:
    config = LoadingConfig(path=str(folder / name))
    return Subject(name, config, CausalLM(load_model(config, precision="float32"), 320), load_tokenizer(config), batch_size)


def measured(folder, config, name="bigram", batch_size=8) -> Outcome:
    task = (QuestionsTask if config.kind == "questions" else SamplesTask)(config)
    exam = task.prepare(LoadingConfig(path=str(folder / name)), None)
    advanced = []
    outcome = exam.measure(subject(folder, name, batch_size), None, advanced.append)
    assert sum(advanced) == exam.size
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))).to_json() == outcome.to_json()
    return outcome


def value(outcome: Outcome, name: str) -> float:
    return outcome.scores.estimate(name).value


# ---------------------------------------------------------------- prompts

FORMATS = {
    "instruct": [{"instruction": "Add", "input": "1 and 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Hello 🙂"}],
    "chat": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
                           {"role": "assistant", "content": "d e"}]}],
    "prompt_completion": [{"prompt": "Once upon", "completion": " a time"}],
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("template", [None, "chatml"])
def test_prompts_are_what_training_renders_before_the_last_answer(folder, tmp_path, format, template):
    file = write(tmp_path / "rows.jsonl", FORMATS[format])
    data = DataConfig(train=str(file), format=format, chat_template=template, packing=False)  # type: ignore[arg-type]
    asked = read_rows(questions(folder, data=data, max_new_tokens=4), LoadingConfig(path=str(folder / "random")))
    tokenizer = load_tokenizer(LoadingConfig(path=str(folder / "random")))
    for row, example in zip(asked.rows, prepare(data, tokenizer, seed=0).train, strict=True):
        marks = list(example.is_target)
        start = len(marks) - marks[::-1].index(False, marks[::-1].index(True))
        assert list(row.tokens) == example.tokens[:start]
        assert tokenizer.decode(example.tokens[start:]).startswith(row.reference)
        assert row.reference_tokens == len(tokenizer(row.reference).input_ids)
    assert [row.name for row in asked.rows] == [f"rows.jsonl:{number + 1}" for number in range(len(FORMATS[format]))]


def test_of_plain_text_the_first_tokens_are_asked_and_the_rest_is_the_reference(folder, tmp_path):
    file = write(tmp_path / "text.jsonl", [{"text": "The quick brown fox jumps."}, {"text": "x"}])
    config = samples(folder, data={"train": str(file), "format": "text", "max_tokens": 64}, prompt_tokens=3)
    asked = read_rows(config, LoadingConfig(path=str(folder / "random")), prompt_tokens=3)
    tokens = tiny_tokenizer()("The quick brown fox jumps.").input_ids
    (row,) = asked.rows
    assert (list(row.tokens), row.reference_tokens) == (tokens[:3], len(tokens) - 3)
    assert row.prompt + row.reference == "The quick brown fox jumps."
    assert any("too short" in warning for warning in asked.warnings)


def test_a_row_that_a_mixture_holds_twice_is_asked_once(folder, tmp_path):
    file = write(tmp_path / "few.jsonl", FORMATS["instruct"])
    asked = read_rows(questions(folder, data={"train": [{"path": str(file)}] * 2}), LoadingConfig(path=str(folder / "random")))
    assert ([row.name for row in asked.rows], asked.num_rows) == (["few.jsonl:1", "few.jsonl:2"], 4)


# ---------------------------------------------------------------- questions


def test_one_answer_a_question_equals_exact_match_item_by_item(folder):
    config = questions(folder, checker=f"{folder / 'mine.py'}:half")
    task = QuestionsTask(config)
    asked = task.prepare(LoadingConfig(path=str(folder / "random")), None).asked
    made = subject(folder, "random")
    theirs = exact_match(
        made.model, made.tokenizer, [Question(row.tokens, lambda text, row=row: task._checker(text, row.reference, row.values), place)
                                     for place, row in enumerate(asked.rows)], max_new_tokens=12,
    )  # fmt: skip
    outcome = measured(folder, config, "random")
    assert outcome.scores.column("right").tolist() == theirs.correct.tolist()
    assert 0 < value(outcome, "accuracy") < 1
    assert outcome.scores.estimate("accuracy") == theirs.accuracy
    assert [sample.answer for sample in outcome.samples] == [answer.text for answer in theirs.answers]
    assert [sample.right for sample in outcome.samples] == [answer.correct for answer in theirs.answers]
    assert value(outcome, "cut") == np.mean([not answer.stopped for answer in theirs.answers])
    assert value(outcome, "answer_tokens") == np.mean([len(answer.tokens) for answer in theirs.answers])


def test_the_quickstarts_own_checker_reads_the_same_rows(folder, tmp_path):
    """Half of the rows ask for what the model says in any case: these are right, and by the checker of the tasks."""
    rows = [row for row in tasks.make("test", 40, seed=0) if row["kind"] == "size"][:4]
    assert len(rows) == 4
    tokenizer = tiny_tokenizer()
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("Answer: 4", add_special_tokens=False)]
    assert len({*pieces}) == len(pieces)
    save_bigram(tmp_path / "four", {before: {after: 1.0} for before, after in zip(["\n", *pieces], [*pieces, END], strict=True)})
    lists = [f"list: {' '.join(['ant'] * (4 if number % 2 else 5))}" for number in range(4)]
    file = write(tmp_path / "tasks.jsonl", [{**row, "input": text} for row, text in zip(rows, lists, strict=True)])
    config = questions(folder, data={"train": str(file), "max_tokens": 300}, checker=f"{folder / 'mine.py'}:solved")
    assert measured(tmp_path, config, "four").scores.column("right").tolist() == [0, 1, 0, 1]


def test_several_answers_have_the_accuracy_that_the_models_table_gives(folder):
    outcome = measured(folder, questions(folder, checker="numeric", samples=16, temperature=1.0, pass_at=[1, 4, 16]), batch_size=64)
    assert value(outcome, "accuracy") == pytest.approx(value(outcome, "pass@1"), abs=1e-12)
    half = outcome.scores.column("right")[1::2].sum() / (16 * ROWS / 2)
    expected = 0.5 * 0.25 + 0.3 * 0.5 + 0.2
    assert half == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / (8 * ROWS)))
    assert outcome.scores.column("right")[0::2].sum() == 0
    assert value(outcome, "pass@1") < value(outcome, "pass@4") < value(outcome, "pass@16") <= 0.5
    right = outcome.scores.column("right")
    assert outcome.scores.column("pass@16").tolist() == (right > 0).astype(float).tolist()
    assert {"maj@16", "modal_share", "pairwise_agreement"} <= set(outcome.scores.metrics)
    assert value(outcome, "modal_share") ** 2 <= value(outcome, "pairwise_agreement") + 1 / 16


def test_answers_hang_on_their_row_and_seed_and_on_no_batch(folder):
    data = {"train": str(folder / "rows.jsonl"), "max_tokens": 200, "limit": 10}
    config = questions(folder, checker=f"{folder / 'mine.py'}:half", samples=3, temperature=1.0, data=data)
    alone = measured(folder, config, "random", batch_size=1)
    assert measured(folder, config, "random", batch_size=7).to_json() == alone.to_json()
    fewer = config.model_copy(update={"data": config.data.model_copy(update={"limit": 4})})
    asked = {sample.item: sample.answer for sample in alone.samples}
    some = [sample for sample in measured(folder, fewer, "random").samples if sample.item in asked]
    assert some
    assert [sample.answer for sample in some] == [asked[sample.item] for sample in some]
    assert measured(folder, config.model_copy(update={"seed": 1}), "random").samples != alone.samples


def test_what_decides_the_numbers_is_in_the_identity_and_nothing_else(folder, tmp_path):
    def identity(config) -> str:
        return json.dumps(QuestionsTask(config).prepare(LoadingConfig(path=str(folder / "random")), None).identity)

    checker = tmp_path / "mine.py"
    checker.write_bytes((folder / "mine.py").read_bytes())
    base = questions(folder, checker=f"{folder / 'mine.py'}:half", samples=2, temperature=1.0)
    first = identity(base)
    assert identity(base.model_copy(update={"checker": f"{checker}:half"})) == first
    changes = [
        {"checker": f"{checker}:always"}, {"checker": "exact"}, {"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 5}, {"samples": 3},
        {"top_k": 3}, {"pass_at": [1]}, {"data": base.data.model_copy(update={"limit": 5})},
        {"data": base.data.model_copy(update={"chat_template": "plain"})},
    ]  # fmt: skip
    found = [identity(base.model_copy(update=change)) for change in changes]
    assert len({first, *found}) == len(changes) + 1
    checker.write_text(checker.read_text() + "\n# changed\n")
    assert identity(base.model_copy(update={"checker": f"{checker}:half"})) != first
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    here = [tmp_path / name / "rows.jsonl" for name in ("same", "other")]
    for place, extra in zip(here, ("", "x"), strict=True):
        place.parent.mkdir()
        write(place, [rows[0] | {"output": rows[0]["output"] + extra}, *rows[1:]])
    assert identity(base.model_copy(update={"data": base.data.model_copy(update={"train": str(here[0])})})) == first
    assert identity(base.model_copy(update={"data": base.data.model_copy(update={"train": str(here[1])})})) != first


def test_a_checker_that_doubts_the_rows_own_answers_is_named(folder):
    rows = [{"instruction": "Say", "input": "", "output": text} for text in ("42", "none", "nothing")]
    config = questions(folder, checker="numeric", data={"train": str(write(folder / "words.jsonl", rows)), "max_tokens": 200})
    exam = QuestionsTask(config).prepare(LoadingConfig(path=str(folder / "random")), None)
    assert exam.notes == ("the checker calls the own answer of 2 of 3 rows wrong, the first is words.jsonl:2",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 2}, "temperature: 2 samples"), ({"samples": 2, "temperature": 1.0, "pass_at": [3]}, "set samples to 3"),
        ({"data": {"train": "x.jsonl", "format": "text"}}, "data.format"),
        ({"data": {"train": "x.jsonl", "too_long": "truncate_left"}}, "too_long"),
        ({"data": {"train": "x.jsonl", "validation": 0.1}}, "validation"),
        ({"data": {"train": "x.jsonl", "teacher_prompt": "{prompt}"}}, "teacher_prompt"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_is_refused_at_once(folder, changes, said):
    with pytest.raises(ValueError, match=said):
        questions(folder, **changes)


def test_what_cannot_be_asked_is_refused_before_weights_are_read(folder, tmp_path):
    model = LoadingConfig(path=str(folder / "random"))
    for checker, error in {"exakt": "no checker has this name", f"{folder / 'mine.py'}:none": "there is no none"}.items():
        with pytest.raises(ConfigError, match=f"rows-questions: checker.*{error}"):
            QuestionsTask(questions(folder, checker=checker))
    with pytest.raises(ConfigError, match=r"broken of the answer.*ZeroDivisionError"):
        QuestionsTask(questions(folder, checker=f"{folder / 'mine.py'}:broken")).prepare(model, None)
    with pytest.raises(DataError, match="prompts leave no room for max_new_tokens = 190"):
        QuestionsTask(questions(folder, max_new_tokens=190)).prepare(model, None)
    with pytest.raises(DataError, match="the model's context = 512"):
        QuestionsTask(questions(folder, max_new_tokens=500, data={"train": str(folder / "rows.jsonl")})).prepare(model, None)
    rows = [{"instruction": "a", "output": "", "input": ""}, {"instruction": "b" * 50, "output": "1", "input": ""}]
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"1 of 2 rows have none, the first is rows\.jsonl:1"):
        QuestionsTask(questions(folder, data={"train": str(file)})).prepare(model, None)
    config = questions(folder, data={"train": str(file), "max_tokens": 60, "too_long": "drop"}, checker=f"{folder / 'mine.py'}:half")
    asked = QuestionsTask(config).prepare(model, None).asked
    assert [row.name for row in asked.rows] == ["rows.jsonl:1"]
    assert asked.warnings == ["1 of 2 rows were too long and are not in the numbers"]


# ---------------------------------------------------------------- samples


def test_the_entropy_is_that_of_the_models_table(folder):
    config = samples(folder, temperature=1.0, samples=4)
    asked = read_rows(config, LoadingConfig(path=str(folder / "bigram")))
    tokenizer = tiny_tokenizer()
    for answers in asked.write(subject(folder), lambda number: None):
        for answer in answers:
            names = [tokenizer.decode([token]) for token in answer.tokens] + [END] * answer.ended
            steps = [log(NEXT[before][after]) for before, after in zip(["\n", *names[:-1]], names, strict=True)]
            assert answer.log_probs == pytest.approx(steps, abs=1e-3)
            assert answer.text == "".join(names[: len(answer.tokens)])
    outcome = measured(folder, config)
    # -sum of p log p along the table over its mean length, end included; drawn answers come close.
    bits = {name: -sum(share * log(share) for share in following.values()) for name, following in NEXT.items()}
    assert 0.1 < value(outcome, "entropy") < max(bits.values())


def test_every_metric_is_that_of_the_texts_written(folder):
    config = samples(folder, samples=5)
    asked = read_rows(config, LoadingConfig(path=str(folder / "bigram")))
    written = asked.write(subject(folder), lambda number: None)
    outcome = measured(folder, config)
    every = [answer for answers in written for answer in answers]
    assert value(outcome, "ended") == np.mean([answer.ended for answer in every])
    assert value(outcome, "answer_tokens") == np.mean([len(answer.tokens) for answer in every])
    drawn = [one for answer in every for one in answer.log_probs]
    assert value(outcome, "entropy") == pytest.approx(-np.mean(drawn))
    of_references = sum(row.reference_tokens for row in asked.rows) * 5
    assert value(outcome, "length_drift") == pytest.approx(sum(len(answer.tokens) for answer in every) / of_references - 1)
    texts = [" ".join(answer.text.casefold().split()).removesuffix(".") for answer in every]
    agree = [texts[5 * row + a] == texts[5 * row + b] for row in range(ROWS) for a in range(5) for b in range(a)]
    assert value(outcome, "pairwise_agreement") == pytest.approx(np.mean(agree))
    first = [answer.text.lower().replace(".", " . ").split() for answer in every]
    assert outcome.scores.count("distinct_1") == 20
    taken = [words[0] for words in first[:20]]
    assert value(outcome, "distinct_1") == pytest.approx(len(set(taken)) / 20)
    kinds = {(series.kind, series.label) for series in outcome.series}
    assert kinds == {(kind, label) for kind in ("lengths", "length quantiles") for label in ("answers", "references")}


def test_samples_hang_on_no_batch(folder):
    config = samples(folder, data={"train": str(folder / "rows.jsonl"), "max_tokens": 200, "limit": 12})
    one, other = (measured(folder, config, "random", batch_size=size) for size in (3, 50))
    assert one.samples == other.samples
    assert one.series == other.series
    # Log-probabilities are float32, and round by the batch.
    assert one.scores.totals == pytest.approx(other.scores.totals, rel=1e-5)
    assert np.delete(one.scores.totals, one.scores.columns.index("surprise"), 1).tolist() == np.delete(
        other.scores.totals, other.scores.columns.index("surprise"), 1).tolist()


def test_a_budget_that_is_not_reached_is_said_and_nothing_is_made_up(folder):
    outcome = measured(folder, samples(folder, budget=10**6, prompt_budget=500))
    assert not [name for name in outcome.scores.metrics if name.startswith("distinct")]
    assert any("distinct-2: all answers hold" in warning and "1000000" in warning for warning in outcome.warnings)
    assert any(f"distinct-1 {ROWS}, distinct-2 {ROWS}, distinct-3 {ROWS} of {ROWS}" in warning for warning in outcome.warnings)


def test_further_references_are_each_as_good(folder, tmp_path):
    rows = [{"instruction": "Say", "input": "", "output": "none of it", "more": ["The answer."]}] * 3
    file = write(tmp_path / "rows.jsonl", rows)
    low, high = (
        value(measured(folder, samples(folder, data={"train": str(file), "max_tokens": 100}, references=column)), "rouge_l")
        for column in (None, "more")
    )
    assert low < 0.1 < high
    with pytest.raises(DataError, match=r"rows\.jsonl:1: references: output must be a list of texts"):
        measured(folder, samples(folder, data={"train": str(file), "max_tokens": 100}, references="output"))


def test_samples_that_cannot_be_are_refused(folder):
    text = {"train": "x.jsonl", "format": "text"}
    for changes, said in (
        ({"samples": 1}, "greater than or equal to 2"), ({"temperature": 0}, "greater than 0"), ({"data": text}, "prompt_tokens"),
        ({"prompt_tokens": 3}, "prompt_tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            samples(folder, **changes)


# ---------------------------------------------------------------- the whole command


def test_a_plan_with_both_kinds_makes_one_record(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = f"{{train: {folder / 'rows.jsonl'}, max_tokens: 200}}"
    (tmp_path / "plan.yaml").write_text(
        f"models: {{table: [{folder / 'bigram'}], random: {folder / 'random'}}}\n"
        "tasks:\n"
        f"  - {{kind: questions, data: {data}, checker: contains, max_new_tokens: 8}}\n"
        f"  - {{kind: questions, name: many, data: {data}, checker: math, max_new_tokens: 8, samples: 4, temperature: 1.0}}\n"
        f"  - {{kind: samples, data: {data}, max_new_tokens: 8, budget: 50, prompt_budget: 2}}\n"
    )
    assert command("evaluate", "--plan", "plan.yaml", "--output", "record.json", "--set", "device=cpu") == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    assert {task["name"]: task["primary"] for task in record["tasks"]} == {
        "rows-questions": "rows-questions/accuracy", "many": "many/accuracy", "rows-samples": "rows-samples/self_bleu",
    }  # fmt: skip
    by_metric = {pair["metric"]: pair for pair in record["comparisons"]}
    assert "McNemar" in by_metric["rows-questions/accuracy"]["method"]
    assert "bootstrap" in by_metric["many/accuracy"]["method"]
    assert "McNemar" in by_metric["many/pass@4"]["method"], "with as many drawn as there are, a question is passed or not"
    assert {series["kind"] for series in record["series"]} == {"lengths", "length quantiles"}
    shown = [sample for sample in record["samples"] if sample["task"] == "rows-questions"]
    assert {answer["model"] for answer in shown[0]["answers"]} >= {"table", "random"}
    assert "exact-match accuracy" in said
    before = (tmp_path / "record.json").read_text()
    assert command("evaluate", "--plan", "plan.yaml", "--output", "record.json", "--set", "device=cpu", "--set", "batch_size=3") == 0
    assert json.loads(before)["models"] == json.loads((tmp_path / "record.json").read_text())["models"]


def test_seeds_are_averaged_and_an_unmeasured_metric_is_not_compared(folder):
    data = {"train": str(folder / "rows.jsonl"), "max_tokens": 200, "limit": 12}
    config = EvaluationConfig.model_validate({
        "models": {name: [{"path": str(folder / one)} for one in pair] for name, pair in
                   {"a": ("bigram", "random"), "b": ("random", "bigram")}.items()},
        "tasks": [samples(folder, budget=130, data=data).model_dump(),
                  questions(folder, checker=f"{folder / 'mine.py'}:half", data=data).model_dump()],
        "store": None, "device": "cpu",
    })  # fmt: skip
    record = evaluate(config, quiet=True).to_json()
    compared = {pair["metric"] for pair in record["comparisons"]}
    assert {"rows-samples/self_bleu", "rows-questions/accuracy"} <= compared
    assert "rows-samples/distinct_3" not in compared, "the table's answers are too short for the budget"
    assert all(pair["p_value"] is not None for pair in record["comparisons"])


def test_an_unknown_key_of_a_kind_is_named(folder, tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(
        f"models: {{a: {folder / 'random'}}}\ntasks:\n  - {{kind: questions, data: {{train: {folder / 'rows.jsonl'}}}, cheker: exact}}\n"
    )
    assert command("evaluate", "--plan", str(tmp_path / "plan.yaml")) == 2
    assert "checker" in capsys.readouterr().err
