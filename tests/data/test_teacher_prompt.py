"""What the teacher reads in place of the student's last user turn: filled from the row, cut with it, and followed by the same answer."""

import json

import pytest
import torch
from pydantic import ValidationError

from potstill.data.collation import collate
from potstill.data.config import DataConfig
from potstill.data.prepare import prepare, split
from potstill.errors import DataError
from potstill.models.causal_lm import CausalLM
from potstill.objectives.distribution import DistributionMatching
from potstill.teachers.self_teacher import SelfTeacher
from potstill.training.distiller import Distiller
from potstill.training.feeding import Rows
from tiny import CHATML, CHATML_WITHOUT_MASK, tiny_llama, tiny_tokenizer

HINTED = "{prompt}\n\nA right answer is: {answer} ({{hint {hint}}})"
INSTRUCT = [{"instruction": f"Question {i}", "input": "", "output": f"Answer number {i}.", "hint": f"h{i}"} for i in range(12)]


def _file(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def _config(folder, rows, wording: str | None = HINTED, **changes):
    return DataConfig(train=_file(folder, rows), teacher_prompt=wording, **{"max_tokens": 256, **changes})


def _prepared(folder, rows, wording: str | None = HINTED, *, tokenizer=None, **changes):
    return prepare(_config(folder, rows, wording, **changes), tokenizer or tiny_tokenizer(), seed=0)


def _read(example):
    """What the teacher reads before the answer, and the answer."""
    tokenizer = tiny_tokenizer()
    targets = [token for token, marked in zip(example.tokens, example.is_target, strict=True) if marked]
    return tokenizer.decode(example.teacher_prompt), tokenizer.decode(targets)


@pytest.mark.parametrize("template", [CHATML, CHATML_WITHOUT_MASK], ids=["marks", "prefixes"])
def test_the_wording_takes_the_place_of_the_user_turn(tmp_path, template):
    examples = _prepared(tmp_path, INSTRUCT, tokenizer=tiny_tokenizer(chat_template=template)).train
    for number, example in enumerate(examples):
        prompt, answer = _read(example)
        assert answer == f"Answer number {number}.<|im_end|>"
        assert prompt == (
            f"<|im_start|>user\nQuestion {number}\n\nA right answer is: Answer number {number}. ({{hint h{number}}})<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        behind = example.for_teacher()
        assert example.teacher_prompt is not None
        assert behind.tokens[len(example.teacher_prompt) :] == example.tokens[example.prompt_length :]
        assert example.num_targets == behind.num_targets


def test_the_students_own_turn_alone_is_what_the_student_reads(tmp_path):
    with_it, without = _prepared(tmp_path, INSTRUCT, "{prompt}").train, _prepared(tmp_path, INSTRUCT, None).train
    for example, plain in zip(with_it, without, strict=True):
        assert plain.teacher_prompt is None
        assert (example.tokens, example.is_target) == (plain.tokens, plain.is_target)
        assert example.for_teacher().tokens == example.tokens
        assert example.for_teacher().is_target == example.is_target


def test_of_a_conversation_the_last_user_turn_is_meant_and_the_last_answer_learned(tmp_path):
    turns = [("system", "S"), ("user", "one"), ("assistant", "first"), ("user", "two"), ("tool", "called"), ("assistant", "second")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,) = _prepared(tmp_path, [row], "<{prompt}|{answer}>", format="chat").train
    prompt, answer = _read(example)
    assert answer == "second<|im_end|>"
    assert prompt == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\n<two|second><|im_end|>\n<|im_start|>tool\ncalled<|im_end|>\n<|im_start|>assistant\n"
    )
    (without,) = _prepared(tmp_path, [row], None, format="chat").train
    assert without.tokens == example.tokens
    assert without.num_targets > example.num_targets  # both answers


def test_a_prompt_and_its_completion(tmp_path):
    rows = [{"prompt": "2 + 2 = ", "completion": "4", "grade": 7}]
    (example,) = _prepared(tmp_path, rows, "grade {grade}: {prompt}", format="prompt_completion").train
    assert _read(example) == ("grade 7: 2 + 2 = ", "4<|im_end|>")


def test_what_a_column_holds_is_text_and_no_token_of_the_template(tmp_path):
    (example,) = _prepared(tmp_path, [{**INSTRUCT[0], "hint": "<|im_end|>"}]).train
    assert example.teacher_prompt is not None
    assert [token == tiny_tokenizer().eos_token_id for token in example.teacher_prompt].count(True) == 1  # the user turn's own
    assert "hint <|im_end|>" in _read(example)[0]


@pytest.mark.parametrize(("wording", "words"), [
    ("{prompt", "expected '}'"), ("{}", "name of a column"), ("{prompt!r}", "name of a column"), ("{hint:>9}", "name of a column"),
    ("}", "written twice"), ("", "at least 1 character"),
])  # fmt: skip
def test_a_wording_that_does_not_read_is_refused_at_once(wording, words):
    with pytest.raises(ValidationError, match="teacher_prompt") as refused:
        DataConfig(train="x.jsonl", teacher_prompt=wording)
    assert words in str(refused.value)


def test_plain_text_has_no_turn_to_take_the_place_of():
    with pytest.raises(ValidationError, match=r"teacher_prompt: .*format text has none"):
        DataConfig(train="x.jsonl", teacher_prompt="{prompt}", format="text")


def test_a_column_that_is_nowhere_stops_and_one_that_a_row_lacks_is_a_bad_row(tmp_path):
    with pytest.raises(DataError, match=r"no column 'hint\.text', which data\.teacher_prompt names; the columns are hint, input"):
        _prepared(tmp_path, INSTRUCT, "{hint.text}")
    lacking = [{key: value for key, value in INSTRUCT[0].items() if key != "hint"}, *INSTRUCT[1:]]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'hint' is missing, which data\.teacher_prompt names"):
        _prepared(tmp_path, lacking)
    data = _prepared(tmp_path, lacking, on_bad_line={"skip": 1})
    assert (data.counts.rejected, data.counts.used) == (1, 11)


@pytest.mark.parametrize(("value", "kind"), [(None, "null"), ([1], "a list"), (True, "a bool"), ({"a": 1}, "a dict")])
def test_what_is_no_text_is_a_bad_row(tmp_path, value, kind):
    with pytest.raises(DataError, match=f"rows.jsonl:2: column 'hint', which data.teacher_prompt names, is {kind}"):
        _prepared(tmp_path, [INSTRUCT[0], {**INSTRUCT[1], "hint": value}])


def test_a_row_whose_prompt_cannot_be_replaced_is_a_bad_row(tmp_path):
    alone = {"messages": [{"role": "assistant", "content": "unasked"}]}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no user turn stands before the last answer"):
        _prepared(tmp_path, [alone], "{prompt}", format="chat")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: nothing stands before the answer"):
        _prepared(tmp_path, [{"prompt": "", "completion": "4"}], "grade: {prompt}", format="prompt_completion")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the teacher's prompt has no token"):
        _prepared(tmp_path, [{"prompt": "2", "completion": "4", "hint": ""}], "{hint}", format="prompt_completion")


def test_rows_without_an_answer_are_counted_as_before(tmp_path):
    silent = {"messages": [{"role": "user", "content": "?"}]}
    asked = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    data = _prepared(tmp_path, [silent, asked], "{prompt}", format="chat")
    assert (data.counts.empty, data.counts.used) == (1, 1)


def test_it_follows_its_row_through_splits_and_selections(tmp_path):
    data = _prepared(tmp_path, INSTRUCT, validation=0.3)
    assert data.validation is not None
    for part in (data.train, data.validation, *split(data.train, 0.5, 3), data.train[::-2], data.train.select([2, 0])):
        for example in part:
            number = int(example.origin.rpartition(":")[2]) - 1
            assert f"{{hint h{number}}}" in _read(example)[0]
    assert len(data.train.select([])) == 0


@pytest.mark.parametrize("policy", ["error", "drop", "truncate_left", "truncate_right"])
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_the_teacher_reads_no_more_than_is_allowed_either(tmp_path, policy, extra):
    (whole,) = _prepared(tmp_path, INSTRUCT[:1]).train
    longest = len(whole.for_teacher().tokens)
    limit = longest - extra
    if policy == "error" and extra:
        with pytest.raises(DataError, match=f"the longest {longest} "):
            _prepared(tmp_path, INSTRUCT[:1], too_long=policy, max_tokens=limit)
        return
    if policy == "drop" and extra:
        with pytest.raises(DataError, match="1 too long"):
            _prepared(tmp_path, INSTRUCT[:1], too_long=policy, max_tokens=limit)
        return
    data = _prepared(tmp_path, INSTRUCT[:1], too_long=policy, max_tokens=limit)
    (example,) = data.train
    assert (data.counts.longest, data.counts.too_long, data.counts.truncated) == (longest, bool(extra), bool(extra))
    assert len(example.for_teacher().tokens) == limit
    assert whole.teacher_prompt is not None
    if policy == "truncate_left":  # the answer is whole, and so is what the student reads
        assert example.tokens == whole.tokens
        assert example.teacher_prompt == whole.teacher_prompt[extra:]
    else:
        assert example.teacher_prompt == whole.teacher_prompt
        assert example.tokens == whole.tokens[: len(whole.tokens) - extra]
    batch = collate([[example]], pad_token=0)
    assert batch.teacher_view is not None
    assert batch.teacher_view.num_targets == example.num_targets


def test_a_cut_that_leaves_no_prompt_leaves_nothing(tmp_path):
    rows = [{"prompt": "2 + 2 = ", "completion": "four, as everyone knows who can count"}, {"prompt": "1", "completion": "2"}]
    data = _prepared(tmp_path, rows, "{prompt}{answer}", format="prompt_completion", too_long="truncate_left", max_tokens=12)
    assert (data.counts.empty, data.counts.used) == (1, 1)


def test_another_wording_is_other_data(tmp_path):
    prints = {
        Rows(_prepared(tmp_path, INSTRUCT, wording).train, pad_token=0, seed=0, max_tokens=None).fingerprint
        for wording in (None, "{prompt}", "{prompt} {hint}", "{prompt} {answer}")
    }
    assert len(prints) == 4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("wording", "learns"), [("{prompt}", False), ("{prompt} The answer: {answer}", True)])
def test_a_student_that_is_told_no_more_than_itself_learns_nothing_from_itself(tmp_path, packed, wording, learns):
    student = CausalLM(tiny_llama(), 320)
    objective = DistributionMatching(divergence="reverse_kl", kd_ratio=1.0, vocabulary_size=320)
    examples = list(_prepared(tmp_path, INSTRUCT[:4], wording).train)
    batch = collate([examples[:2], examples[2:]] if packed else [[example] for example in examples], pad_token=0)
    distiller = Distiller(student, objective)
    assert batch.teacher_view is not None
    total, _, _ = distiller(batch, SelfTeacher(student, "live").score(batch.teacher_view, objective.needs))
    total.backward()
    gradient = max(float(parameter.grad.abs().max()) for parameter in student.parameters() if parameter.grad is not None)
    assert (float(total.detach()) > 1e-3, gradient > 1e-3) == (learns, learns)
    if not learns:
        assert torch.allclose(total.detach(), torch.zeros(()), atol=1e-5)
        assert gradient < 1e-5
