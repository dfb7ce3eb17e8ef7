"""The student's own text: what is measured on it, from its definition; what it is held against; and what cannot be measured is refused."""

import json
import math

import numpy as np
import pytest
import torch

from potstill.errors import ConfigError, DataError, IncompatibleError
from potstill.evaluation.config import EvaluationConfig
from potstill.evaluation.evaluate import evaluate
from potstill.evaluation.own_text_config import OwnTextTaskConfig
from potstill.evaluation.own_text_task import OwnTextTask
from potstill.evaluation.speculation_config import SpeculationTaskConfig
from potstill.evaluation.speculation_task import SpeculationTask
from potstill.evaluation.task import Subject
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.recipes.mistakes import build
from potstill.recipes.text import parse
from tiny import save_pair, tiny_llama, tiny_tokenizer

VOCABULARY, NEW, END = 320, 12, 2


def said(number: int) -> str:
    return f"{number} + {number + 1} = {2 * number + 1}. " * (1 + number % 3)


def sharp(seed: int):
    model = tiny_llama(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(12.0)
        # Answers end now and then.
        model.lm_head.weight[END] *= 1.5
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    for seed, name in enumerate(("student", "other", "teacher", "stranger")):
        save_pair(place / name, seed)
        sharp(seed).save_pretrained(place / name)
    file = place / "stranger" / "tokenizer.json"
    vocabulary = json.loads(file.read_text(encoding="utf-8"))
    pieces = vocabulary["model"]["vocab"]
    pieces["a"], pieces["b"] = pieces["b"], pieces["a"]
    file.write_text(json.dumps(vocabulary), encoding="utf-8")
    rows = [{"instruction": f"Add {n} and {n + 1}.", "input": "", "output": said(n)} for n in range(6)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "open.jsonl").write_text("".join(json.dumps(row | {"output": "" if n % 2 else "Yes."}) + "\n"
                                              for n, row in enumerate(rows)), encoding="utf-8")  # fmt: skip
    (place / "text.jsonl").write_text("".join(json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 2}) + "\n"
                                              for _ in range(3)), encoding="utf-8")  # fmt: skip
    return place


def task(folder, name="rows.jsonl", **changes) -> OwnTextTask:
    values = {"kind": "own_text", "data": {"train": str(folder / name), "max_tokens": 128}, "sampling": {"max_new_tokens": NEW}}
    return OwnTextTask(OwnTextTaskConfig.model_validate(values | changes))


def subject(folder, name: str, batch_size: int = 4) -> Subject:
    seed = ("student", "other", "teacher").index(name)
    return Subject(name, LoadingConfig(path=str(folder / name)), CausalLM(sharp(seed), VOCABULARY), tiny_tokenizer(), batch_size)


def measured(folder, made: OwnTextTask, *, student="student", batch_size=4):
    ours, theirs = subject(folder, student, batch_size), subject(folder, "teacher", batch_size)
    exam, done = made.prepare(ours.config, theirs.config), []
    outcome = exam.measure(ours, theirs, done.append)
    assert sum(done) == exam.size
    return exam, outcome


def greedily(model, prompt) -> list[int]:
    """The most likely token, one forward over everything after the other."""
    written = []
    while len(written) < NEW and END not in written:
        written.append(int(model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, -1].argmax()))
    return written


def distributions(folder, prompt, answer):
    """Student's and teacher's float64 probabilities [T, V] of each token of an answer."""
    tokens = torch.tensor([[*prompt, *answer]])
    models = [subject(folder, name).model.model for name in ("student", "teacher")]
    return [torch.softmax(model(input_ids=tokens).logits[0].double(), -1)[len(prompt) - 1 : -1].detach().numpy() for model in models]


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=1)


def test_every_metric_equals_its_definition(folder):
    exam, outcome = measured(folder, task(folder, sampling={"temperature": 0.0, "max_new_tokens": NEW}))
    student, tokenizer = sharp(0), tiny_tokenizer()
    own, beside, answers = [], [], []
    for number in range(6):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Add {number} and {number + 1}."}], add_generation_prompt=True, tokenize=False
        )
        prompt, reference = tokenizer(asked).input_ids, [*tokenizer(said(number)).input_ids, END]
        answers.append(greedily(student, prompt))
        own.append((*distributions(folder, prompt, answers[-1]), answers[-1]))
        beside.append((*distributions(folder, prompt, reference[:NEW]), reference[:NEW]))
    assert [tuple(prompt) for prompt in exam.prompted.prompts][5] == tuple(prompt)
    q, p = (np.concatenate([rows[side] for rows in own]) for side in (0, 1))
    other_q, other_p = (np.concatenate([rows[side] for rows in beside]) for side in (0, 1))
    tokens = np.concatenate([rows[2] for rows in own])
    mixture = (q + p) / 2
    expected = {
        "reverse_kl": kl(q, p).mean(), "forward_kl": kl(p, q).mean(), "jsd": ((kl(p, mixture) + kl(q, mixture)) / 2).mean(),
        "total_variation": np.abs(p - q).sum(axis=1).mean() / 2, "acceptance_rate": np.minimum(p, q).sum(axis=1).mean(),
        "top1_agreement": (p.argmax(axis=1) == q.argmax(axis=1)).mean(), "entropy": -(q * np.log(q)).sum(axis=1).mean(),
        "entropy_gap": (p * np.log(p)).sum(axis=1).mean() - (q * np.log(q)).sum(axis=1).mean(),
        "overlap_at_5": np.mean([len({*one} & {*two}) / 5 for one, two in zip(np.argsort(-q)[:, :5], np.argsort(-p)[:, :5], strict=True)]),
        "teacher_perplexity": math.exp(-np.log(p[np.arange(len(tokens)), tokens]).mean()),
        "forward_kl_beside": kl(other_p, other_q).mean(), "exposure_bias": kl(p, q).mean() / kl(other_p, other_q).mean(),
        "answer_tokens": len(tokens) / 6, "ended": np.mean([END in answer for answer in answers]),
    }  # fmt: skip
    assert set(outcome.scores.metrics) == set(expected)
    for name, value in expected.items():
        assert outcome.scores.estimate(name).value == pytest.approx(value, rel=1e-4), name
    assert outcome.scores.items == tuple(f"rows.jsonl:{line}" for line in range(1, 7))
    assert outcome.scores.primary == "reverse_kl"
    lines = {series.label: series for series in outcome.series}
    assert {series.kind for series in outcome.series} == {"exposure_bias"}
    first = [np.array([kl(rows[1], rows[0])[0] for rows in side]).mean() for side in (own, beside)]
    assert lines["on the student's own text"].y[0] == pytest.approx(first[0], rel=1e-4)
    assert lines["on the data set's text"].y[0] == pytest.approx(first[1], rel=1e-4)
    # Before anything is written both see the same.
    assert first[0] == pytest.approx(first[1])
    second = [np.concatenate([kl(rows[1], rows[0])[1:3] for rows in side]).mean() for side in (own, beside)]
    assert lines["ratio"].x[:2] == (1.0, 2.5)
    assert lines["ratio"].y[:2] == pytest.approx((1.0, second[0] / second[1]), rel=1e-4)
    sample = outcome.samples[0]
    assert (sample.item, sample.answer) == ("rows.jsonl:1", tokenizer.decode(answers[0], skip_special_tokens=True))
    assert "Add 0 and 1." in sample.prompt


def test_the_same_text_whatever_the_batch_and_another_for_another_seed(folder):
    _, outcome = measured(folder, task(folder))
    _, alone = measured(folder, task(folder), batch_size=1)
    _, other = measured(folder, task(folder, seed=1))
    assert [one.answer for one in outcome.samples] == [one.answer for one in alone.samples] != [one.answer for one in other.samples]
    np.testing.assert_allclose(outcome.scores.totals, alone.scores.totals, rtol=1e-3, atol=1e-4)


def test_beside_the_teachers_text_the_teacher_writes_once_for_all(folder, monkeypatch):
    from potstill.evaluation.prompted import Pen

    written = []
    write = Pen.write
    monkeypatch.setattr(Pen, "write", lambda self, one, *rest: written.append(one.name) or write(self, one, *rest))
    made = task(folder, "open.jsonl", prefixes="teacher")
    (_, first), (_, second) = (measured(folder, made, student=name) for name in ("student", "other"))
    assert sorted(written) == ["other", "student", "teacher"]
    # Rows without an answer of their own can be asked all the same.
    assert first.scores.items == second.scores.items == tuple(f"open.jsonl:{line}" for line in range(1, 7))
    np.testing.assert_array_equal(first.scores.column("targets of other text"), second.scores.column("targets of other text"))
    assert {series.label for series in first.series} == {"on the student's own text", "on the teacher's text", "ratio"}


def test_a_student_that_is_the_teacher_is_nowhere_away_from_it(folder):
    theirs = subject(folder, "teacher")
    copy = Subject("copy", LoadingConfig(path=str(folder / "teacher")), theirs.model, theirs.tokenizer, 4)
    scores = task(folder).prepare(LoadingConfig(path=str(folder / "student")), theirs.config).measure(copy, theirs, lambda _: None).scores
    assert scores.estimate("reverse_kl").value == pytest.approx(0, abs=1e-6)
    assert scores.estimate("acceptance_rate").value == pytest.approx(1, abs=1e-6)
    assert scores.estimate("forward_kl_beside").value == pytest.approx(0, abs=1e-6)


def test_rows_without_an_answer_are_left_out_and_counted(folder):
    _, outcome = measured(folder, task(folder, "open.jsonl"))
    assert outcome.scores.items == ("open.jsonl:1", "open.jsonl:3", "open.jsonl:5")
    assert outcome.warnings == ("3 of 6 rows have no answer of their own and were not asked",)


def test_plain_text_is_continued_from_its_first_tokens(folder):
    values = {"data": {"train": str(folder / "text.jsonl"), "format": "text", "max_tokens": 128}, "prompt_tokens": 9}
    exam, outcome = measured(folder, task(folder, **values))
    ids = tiny_tokenizer()("The quick brown fox jumps over the lazy dog. " * 2).input_ids
    assert exam.prompted.prompts[0] == tuple(ids[:9])
    assert exam.prompted.answers[0] == tuple(ids[9 : 9 + NEW])
    assert outcome.scores.column("targets of other text").tolist() == [NEW] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": "x.jsonl", "format": "text"}}, "prompt_tokens: the format text has no prompts"),
        ({"prompt_tokens": 4}, "prompt_tokens: is for the format text alone"),
        ({"data": {"train": "x.jsonl", "validation": 0.1}}, "leave validation out"),
        ({"sampling": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"prefixes": "mine"}, "prefixes"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_its_key(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        task(folder, **changes)


def test_prompts_that_leave_no_room_are_refused_or_left_out(folder):
    student, teacher = (LoadingConfig(path=str(folder / name)) for name in ("student", "teacher"))
    rows = [{"instruction": "Add 1 and 2. " * times, "output": "3"} for times in (1, 30, 1)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train": str(folder / "long.jsonl"), "max_tokens": 128, "columns": {"input": None}}
    with pytest.raises(DataError, match=r"1 of 3 prompts leave no room for 12 new tokens within 128 .*long\.jsonl:2"):
        task(folder, data=data).prepare(student, teacher)
    exam = task(folder, data=data | {"too_long": "drop"}).prepare(student, teacher)
    assert exam.prompted.names == ("long.jsonl:1", "long.jsonl:3")
    with pytest.raises(DataError, match="3 of 3 prompts leave no room"):
        task(folder, data=data | {"too_long": "drop"}, sampling={"max_new_tokens": 127}).prepare(student, teacher)


def plan(folder, **changes):
    data = {"train": str(folder / "rows.jsonl"), "max_tokens": 128}
    tasks = [{"kind": "text", "data": data}, {"kind": "own_text", "data": data, "sampling": {"max_new_tokens": NEW}},
             {"kind": "speculation", "data": data, "max_new_tokens": NEW, "drafts": [2, 4]}]  # fmt: skip
    return {"tasks": tasks, "models": {name: [{"path": str(folder / name)}] for name in ("student", "other")},
            "teacher": {"path": str(folder / "teacher")}, "device": "cpu", "store": None} | changes  # fmt: skip


def test_a_table_holds_these_tasks_and_finds_them_again(folder, tmp_path, monkeypatch):
    config = EvaluationConfig.model_validate(plan(folder, store=str(tmp_path / "kept")))
    record = evaluate(config, output=tmp_path / "record.json").to_json()
    by_name = {model["name"]: model["metrics"] for model in record["models"]}
    assert {"rows-own-text/exposure_bias", "rows-speculation/tokens_per_round_4", "rows/perplexity"} <= set(by_name["student"])
    # The teacher has nobody to be compared with; on the text it stands in the table.
    assert {name.partition("/")[0] for name in by_name["teacher"]} == {"rows"}
    compared = {comparison["metric"] for comparison in record["comparisons"]}
    assert "rows-speculation/acceptance_rate" in compared
    assert not {name for name in compared if "predicted_speedup" in name or "cost_ratio" in name}
    kinds = {series["kind"] for series in record["series"]}
    assert kinds == {"calibration", "calibration_count", "by_position", "exposure_bias", "speculation"}
    monkeypatch.setattr("potstill.evaluation.evaluate.load_model", None)
    assert evaluate(config).to_json() == record


def test_without_a_teacher_it_is_refused_by_its_place(folder):
    with pytest.raises(ValueError, match=r"tasks\[1\]: own_text compares the student with a teacher"):
        EvaluationConfig.model_validate(plan(folder, teacher=None))


@pytest.mark.parametrize("made", [OwnTextTask, SpeculationTask])
def test_a_teacher_with_other_tokens_is_refused_with_a_way_out(folder, made):
    kind = {"kind": made.kind, "data": {"train": str(folder / "rows.jsonl"), "max_tokens": 256}}
    config = (OwnTextTaskConfig if made is OwnTextTask else SpeculationTaskConfig).model_validate(kind)
    with pytest.raises(IncompatibleError, match=r"2 of 320 ids mean different tokens.*leave this task or the teacher out"):
        made(config).prepare(LoadingConfig(path=str(folder / "student")), LoadingConfig(path=str(folder / "stranger")))


def test_identities_know_what_decides_the_numbers(folder):
    student, teacher = (LoadingConfig(path=str(folder / name)) for name in ("student", "teacher"))

    def identity(made):
        return json.dumps(dict(made.prepare(student, teacher).identity), sort_keys=True)

    samplings = [{"sampling": {"max_new_tokens": 11}}, {"sampling": {"max_new_tokens": NEW, "top_k": 3}}]
    own = [{}, {"seed": 1}, {"prefixes": "teacher"}, *samplings]
    assert len({identity(task(folder, **changes)) for changes in own}) == len(own)
    assert identity(task(folder)) == identity(task(folder))
    values = {"kind": "speculation", "data": {"train": str(folder / "rows.jsonl"), "max_tokens": 256}}
    others = [{}, {"seed": 1}, {"drafts": [3]}, {"temperature": 0.5}, {"max_new_tokens": 20}]
    made = [SpeculationTask(SpeculationTaskConfig.model_validate(values | changes)) for changes in others]
    assert len({identity(one) for one in made}) == len(others)


def test_unknown_keys_of_these_tasks_are_named():
    text = "models: {a: [{path: x}]}\ntasks:\n- {kind: own_text, data: {train: a.jsonl}, prefixs: teacher}\n"
    with pytest.raises(ConfigError, match=r"prefixs.*prefixes"):
        build(EvaluationConfig, parse(text, "plan.yaml"), "plan.yaml")
