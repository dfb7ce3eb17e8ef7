"""From rows to examples: every row is accounted for, every policy at its boundary, and what cannot be learned from is refused."""

import itertools
import json

import pytest

from potstill.data.config import DataConfig, MixtureItem
from potstill.data.examples import DataCounts
from potstill.data.lines import printable
from potstill.data.prepare import prepare
from potstill.data.preview import preview
from potstill.errors import ConfigError, DataError
from tiny import CHATML, CHATML_WITHOUT_MASK, tiny_tokenizer

INSTRUCT = [
    {"instruction": f"Question {i}", "input": "with input" if i % 2 else "", "output": f"Answer number {i}."} for i in range(20)
]


def _file(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _config(folder, rows, **changes):
    return DataConfig(train=_file(folder, rows), **{"max_tokens": 256, **changes})


def _accounted(counts: DataCounts) -> bool:
    # A row that is cut and has no target left is too long and empty; it is counted as empty.
    return counts.rows == counts.used + counts.empty + counts.unfinished + counts.dropped + counts.rejected


def _texts(examples, tokenizer):
    return [tokenizer.decode(example.tokens) for example in examples]


def test_instruct_rows_become_a_user_turn_and_an_assistant_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    data = prepare(_config(tmp_path, INSTRUCT), tokenizer, seed=0)
    assert _texts(data.train, tokenizer)[:2] == [
        "<|im_start|>user\nQuestion 0<|im_end|>\n<|im_start|>assistant\nAnswer number 0.<|im_end|>\n",
        "<|im_start|>user\nQuestion 1\n\nwith input<|im_end|>\n<|im_start|>assistant\nAnswer number 1.<|im_end|>\n",
    ]
    for number, example in enumerate(data.train):
        targets = [token for token, marked in zip(example.tokens, example.is_target, strict=True) if marked]
        assert tokenizer.decode(targets) == f"Answer number {number}.<|im_end|>"
        assert (example.index, example.origin) == (number, f"{tmp_path}/rows.jsonl:{number + 1}")
    assert data.counts.rows == data.counts.used == 20
    assert data.counts.target_tokens == data.train.num_targets == sum(example.num_targets for example in data.train)
    assert data.counts.tokens == sum(len(example.tokens) for example in data.train)
    alpaca = prepare(_config(tmp_path, INSTRUCT, instruct_prompt="alpaca"), tokenizer, seed=0)
    assert (
        "### Instruction:\nQuestion 1\n\n### Input:\nwith input\n\n### Response:\n<|im_end|>" in _texts(alpaca.train, tokenizer)[1]
    )
    assert "### Input" not in _texts(alpaca.train, tokenizer)[0]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"], ids=["own pad", "pad is EOS"])
@pytest.mark.parametrize("template", [CHATML, CHATML_WITHOUT_MASK], ids=["marks", "prefixes"])
def test_the_eos_of_an_answer_is_a_target_also_where_it_pads(tmp_path, pad, template):
    from potstill.data.collation import collate

    tokenizer = tiny_tokenizer(chat_template=template, pad_token=pad)
    examples = prepare(_config(tmp_path, INSTRUCT), tokenizer, seed=0).train
    batch = collate([[examples[0]], [examples[9], examples[3]]], pad_token=tokenizer.pad_token_id)
    _, targets = batch.target_rows()
    assert (targets == tokenizer.eos_token_id).sum() == 3  # one an answer: none of the padding, none of the prompts


@pytest.mark.parametrize("extra", [-1, 0, 1], ids=["L-1", "L", "L+1"])
@pytest.mark.parametrize("policy", ["error", "drop", "truncate_left", "truncate_right"])
@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
def test_too_long_at_the_boundary(tmp_path, policy, extra, bos):
    tokenizer = tiny_tokenizer()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    rows = [INSTRUCT[0], {"instruction": "Q", "input": "", "output": "a much longer answer than the others have"}]
    changes = {"chat_template": "chatml" if bos else None}
    whole = prepare(_config(tmp_path, rows, **changes), tokenizer, seed=0).train
    length = len(whole[1].tokens)
    assert length > len(whole[0].tokens) + 1
    limit = length - extra
    config = _config(tmp_path, rows, max_tokens=limit, too_long=policy, **changes)
    if extra > 0 and policy == "error":
        with pytest.raises(
            DataError, match=rf"1 of 2 rows have more than data.max_tokens = {limit} tokens, the longest {length} \(.*:2\)"
        ):
            prepare(config, tokenizer, seed=0)
        assert prepare(config, tokenizer, seed=0, strict=False).problems[0].startswith("data.train: 1 of 2 rows")
        return
    data = prepare(config, tokenizer, seed=0)
    assert data.counts.longest == length
    assert data.train[0].tokens == whole[0].tokens  # neighbours stay
    if extra <= 0:
        assert data.train[1].tokens == whole[1].tokens
        assert (data.counts.too_long, data.counts.used) == (0, 2)
        return
    assert data.counts.too_long == 1
    if policy == "drop":
        assert (data.counts.dropped, data.counts.truncated, data.counts.used) == (1, 0, 1)
        return
    assert (data.counts.dropped, data.counts.truncated, data.counts.used) == (0, 1, 2)
    cut, full = data.train[1], whole[1]
    assert len(cut.tokens) == limit
    if policy == "truncate_right":
        assert (cut.tokens, cut.is_target) == (full.tokens[:limit], full.is_target[:limit])
    else:
        kept = int(bos)
        assert cut.tokens == full.tokens[:kept] + full.tokens[kept + extra :]
        assert cut.is_target == full.is_target[:kept] + full.is_target[kept + extra :]


def test_a_cut_answer_has_no_end_and_an_answer_cut_off_wholly_is_empty(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [{"instruction": "Q", "input": "", "output": "word " * 50}, {"instruction": "word " * 50, "input": "", "output": "A"}]
    data = prepare(_config(tmp_path, rows, max_tokens=40, too_long="truncate_right"), tokenizer, seed=0)
    assert (data.counts.used, data.counts.empty, data.counts.truncated, data.counts.too_long) == (1, 1, 1, 2)
    assert tokenizer.eos_token_id not in [
        t for t, marked in zip(data.train[0].tokens, data.train[0].is_target, strict=True) if marked
    ]
    assert _accounted(data.counts)
    # Cut from the left until only targets are left: the first of them has no predictor, the others stay.
    data = prepare(_config(tmp_path, rows, max_tokens=40, too_long="truncate_left"), tokenizer, seed=0)
    assert data.counts.used == 2
    assert data.train[0].num_targets == 38  # 40 tokens without the first and without the line end after the answer
    assert data.train[0].tokens[-2] == tokenizer.eos_token_id
    # Only the end of the answer is left, in first place, where nothing predicts it.
    with pytest.raises(DataError, match=r"0 of 2 rows have target tokens \(2 empty\)"):
        prepare(_config(tmp_path, rows, max_tokens=2, too_long="truncate_left"), tokenizer, seed=0)


@pytest.mark.parametrize("extra", [-1, 0, 1, 2], ids=["L-1", "L", "L+1", "L+2"])
@pytest.mark.parametrize("limit", [2, 3, 16])
def test_a_split_text_predicts_every_token_once(tmp_path, limit, extra):
    tokenizer = tiny_tokenizer()
    long = "x" * (3 * limit + extra - 1)  # a token each, and the EOS
    rows = [{"text": "a"}, {"text": long}, {"text": "b"}]
    data = prepare(_config(tmp_path, rows, format="text", max_tokens=limit, too_long="split"), tokenizer, seed=0)
    pieces = [example for example in data.train if example.origin.endswith(":2")]
    whole = tokenizer(long)["input_ids"] + [tokenizer.eos_token_id]
    assert [token for piece in pieces for token in piece.tokens[1:]] == whole[1:]
    assert all(piece.tokens[0] == before.tokens[-1] for before, piece in itertools.pairwise(pieces))
    assert all(2 <= len(piece.tokens) <= limit and all(piece.is_target) for piece in pieces)
    assert (data.counts.used, data.counts.examples, data.counts.too_long) == (3, len(pieces) + 2, 1)
    assert [example.index for example in data.train] == list(range(len(data.train)))


def test_empty_and_unfinished_answers_are_counted_and_left_out(tmp_path):
    """A third without an answer or cut off by a length limit: what is left is the run on the clean rows."""
    rows = [{**row, "finish_reason": "stop"} for row in INSTRUCT]
    spoiled = list(rows)
    for place, output in enumerate(["", " \n\t", None, ""]):
        spoiled.insert(3 * place, {"instruction": "empty", "input": None, "output": output, "finish_reason": "stop"})
    spoiled.insert(5, {**rows[0], "finish_reason": "length"})
    spoiled.append({**rows[0], "finish_reason": "length"})
    clean = prepare(_config(tmp_path, rows), tiny_tokenizer(), seed=0)
    data = prepare(_config(tmp_path, spoiled), tiny_tokenizer(), seed=0)
    assert [(e.tokens, e.is_target) for e in data.train] == [(e.tokens, e.is_target) for e in clean.train]
    assert (data.counts.rows, data.counts.used, data.counts.empty, data.counts.unfinished) == (26, 20, 4, 2)
    assert _accounted(data.counts)


@pytest.mark.parametrize(
    ("rows", "format"),
    [
        ([{"instruction": "a", "input": "", "output": ""}] * 3, "instruct"),
        ([{"prompt": "a", "completion": " "}] * 3, "prompt_completion"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 3, "chat"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}] * 3, "chat"),
        ([{"text": " "}] * 3, "text"),
    ],
)
def test_no_target_tokens_at_all_is_an_error(tmp_path, rows, format):
    with pytest.raises(DataError, match=r"data.train: 0 of 3 rows have target tokens \(3 empty\)"):
        prepare(_config(tmp_path, rows, format=format), tiny_tokenizer(), seed=0)
    good = _file(tmp_path, [{"text": "a story"}], "good.jsonl")
    with pytest.raises(DataError, match=r"data\.validation: 0 of 3 rows"):
        prepare(
            DataConfig(train=[MixtureItem(path=good, format="text")], validation=_file(tmp_path, rows), format=format),
            tiny_tokenizer(),
            seed=0,
        )


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ROWS = {"instruct": INSTRUCT[1], "chat": CHAT, "prompt_completion": {"prompt": "a", "completion": " b"}, "text": {"text": "a"}}


@pytest.mark.parametrize(("format", "column"), [(format, column) for format, row in ROWS.items() for column in row])
def test_every_column_removed_in_turn(tmp_path, format, column):
    good, bad = dict(ROWS[format], other=1), {key: value for key, value in ROWS[format].items() if key != column} | {"other": 1}
    missing = rf"no column '{column}', which the format {format} needs; the columns are .*other.*; set data.columns: {{{column}: "
    with pytest.raises(DataError, match=missing):
        prepare(_config(tmp_path, [bad, bad], format=format), tiny_tokenizer(), seed=0)
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: column '{column}' is missing; the row has .*other"):
        prepare(_config(tmp_path, [good, bad, good], format=format), tiny_tokenizer(), seed=0)
    data = prepare(_config(tmp_path, [good, bad, good], format=format, on_bad_line={"skip": 1}), tiny_tokenizer(), seed=0)
    assert (data.counts.rows, data.counts.used, data.counts.rejected) == (3, 2, 1)
    renamed = {("their " + key if key == column else key): value for key, value in good.items()}
    data = prepare(_config(tmp_path, [renamed], format=format, columns={column: "their " + column}), tiny_tokenizer(), seed=0)
    assert data.counts.used == 1


def test_the_remedy_names_the_nearest_column_or_the_right_format(tmp_path):
    with pytest.raises(DataError, match=r"set data.columns: \{output: outputs\}"):
        prepare(_config(tmp_path, [{"instruction": "a", "input": "", "outputs": "b"}]), tiny_tokenizer(), seed=0)
    with pytest.raises(DataError, match=r"set data.columns: \{input: YOUR_COLUMN\}"):  # `output` is near, and taken
        prepare(_config(tmp_path, [{"instruction": "a", "output": "b"}]), tiny_tokenizer(), seed=0)
    with pytest.raises(DataError, match=r"or data\.format: chat"):
        prepare(_config(tmp_path, [CHAT]), tiny_tokenizer(), seed=0)
    with pytest.raises(DataError, match=r"or \{input: null\} if there is none"):
        prepare(_config(tmp_path, [{"instruction": "a", "output": "b"}]), tiny_tokenizer(), seed=0)
    data = prepare(_config(tmp_path, [{"instruction": "a", "output": "b"}], columns={"input": None}), tiny_tokenizer(), seed=0)
    assert data.counts.used == 1
    with pytest.raises(DataError, match=r"no column 'sys', which data\.columns gives for 'system'"):
        prepare(_config(tmp_path, [CHAT], format="chat", columns={"system": "sys"}), tiny_tokenizer(), seed=0)


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("instruct", {"instruction": 3, "input": "", "output": "b"}, "'instruction' is a number, not text"),
        ("instruct", {"instruction": "a", "input": ["x"], "output": "b"}, "'input' is a list, not text"),
        ("text", {"text": None}, "'text' is null"),
        ("prompt_completion", {"prompt": {"a": 1}, "completion": "b"}, "'prompt' is an object"),
        ("chat", {"messages": []}, "'messages' is empty"),
        ("chat", {"messages": "[{]"}, "not valid JSON"),
        ("chat", {"messages": ["hello"]}, "message 1 .* no object with a role"),
        ("chat", {"messages": [{"content": "a"}]}, "message 1 .* no object with a role"),
        ("chat", {"messages": [{"role": "user"}]}, r"message 1 .*\(user\) has no content"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "is a list, not text"),
        ("chat", {**CHAT, "tools": "not json"}, "'tools' is text that is not valid JSON"),
        ("chat", {**CHAT, "tools": ["a"]}, "no list of tools"),
        ("chat", {"messages": [{"role": "system", "content": "s"}, *CHAT["messages"]], "system": "t"}, "both a system prompt"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path, format, row, reason):
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        prepare(_config(tmp_path, [ROWS[format], row], format=format), tiny_tokenizer(), seed=0)


def test_no_message_commands_the_terminal(tmp_path):
    refusing = "{%- if 'clear' in messages[0]['content'] %}{{- raise_exception(messages[0]['content']) }}{%- endif %}{%- for"
    template = CHATML.replace("{%- for", refusing, 1)
    rows = [{"instruction": "clear \x1b[2J", "input": "", "output": "b"}]
    with pytest.raises(DataError, match=r"clear \\x1b\[2J") as caught:
        prepare(_config(tmp_path, rows), tiny_tokenizer(chat_template=template), seed=0)
    assert "\x1b" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        prepare(_config(tmp_path, [{"\x1b[2J": "a"}]), tiny_tokenizer(), seed=0)
    assert "\x1b" not in str(caught.value)


def test_messages_and_tools_may_be_json_text_and_null_columns(tmp_path):
    row = {"messages": json.dumps(CHAT["messages"]), "tools": json.dumps([{"name": "f"}]), "system": "Be brief."}
    template = "{{- (tools | tojson) if tools else '' }}" + CHATML
    tokenizer = tiny_tokenizer(chat_template=template)
    data = prepare(_config(tmp_path, [row, {**CHAT, "tools": None, "system": ""}], format="chat"), tokenizer, seed=0)
    assert _texts(data.train, tokenizer) == [
        '[{"name": "f"}]<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n',
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    ]


def test_bad_lines_are_written_to_the_reject_file(tmp_path):
    rows = [INSTRUCT[0], "{", INSTRUCT[1], {"instruction": 1, "input": "", "output": "x"}, INSTRUCT[2]]
    data = prepare(
        _config(tmp_path, rows, on_bad_line={"skip": 5}), tiny_tokenizer(), seed=0, rejects_file=tmp_path / "rejects.jsonl"
    )
    assert (data.counts.rows, data.counts.used, data.counts.rejected) == (5, 3, 2)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [reject["origin"].rpartition(":")[2] for reject in rejects] == ["2", "4"]
    assert rejects[0]["beginning"] == "{"
    validation = _file(tmp_path, ["[", *rows], "validation.jsonl")
    config = _config(tmp_path, rows, on_bad_line={"skip": 5}, validation=validation)
    prepare(config, tiny_tokenizer(), seed=0, rejects_file=tmp_path / "rejects.jsonl")
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    places = ["rows.jsonl:2", "rows.jsonl:4", "validation.jsonl:1", "validation.jsonl:3", "validation.jsonl:5"]
    assert [reject["origin"].rpartition("/")[2] for reject in rejects] == places
    with pytest.raises(DataError, match=r"bad line 2; data\.on_bad_line allows 1"):
        prepare(_config(tmp_path, rows, on_bad_line={"skip": 1}), tiny_tokenizer(), seed=0)


def test_a_fraction_is_held_out_disjoint_seeded_and_duplicates_stay_together(tmp_path):
    rows = [*INSTRUCT, *INSTRUCT[:10], INSTRUCT[0], INSTRUCT[0]]
    tokenizer = tiny_tokenizer()
    seen = set()
    for seed in range(5):
        data = prepare(_config(tmp_path, rows, validation=0.25), tokenizer, seed=seed)
        assert data.validation is not None
        train, validation = set(_texts(data.train, tokenizer)), set(_texts(data.validation, tokenizer))
        assert not train & validation
        assert len(train) + len(validation) == 20
        assert len(data.train) + len(data.validation) == len(rows) == data.counts.used
        assert 8 <= len(data.validation) <= 11
        assert [example.index for example in data.train] == list(range(len(data.train)))
        again = prepare(_config(tmp_path, rows, validation=0.25), tokenizer, seed=seed)
        assert _texts(again.validation, tokenizer) == _texts(data.validation, tokenizer)
        seen.add(tuple(sorted(validation)))
    assert len(seen) == 5
    with pytest.raises(DataError, match="cannot be held out of 3 usable rows of which 1 differ"):
        prepare(_config(tmp_path, [INSTRUCT[0]] * 3, validation=0.5), tokenizer, seed=0)


def test_the_pieces_of_a_split_text_are_held_out_together(tmp_path):
    rows = [{"text": letter * 40} for letter in "abcdefgh"] + [{"text": "a" * 40}]
    config = _config(tmp_path, rows, format="text", max_tokens=16, too_long="split", validation=0.3)
    data = prepare(config, tiny_tokenizer(), seed=0)
    train, validation = ({example.origin for example in examples} for examples in (data.train, data.validation or ()))
    assert train
    assert validation
    assert not train & validation
    assert len({f"{tmp_path}/rows.jsonl:1", f"{tmp_path}/rows.jsonl:9"} & train) in (0, 2)
    assert [len(row) for row in data.train.rows] == [3] * len(train)


def test_rows_shared_with_a_validation_file_are_counted(tmp_path):
    validation = _file(tmp_path, [*INSTRUCT[:3], {"instruction": "new", "input": "", "output": "row"}], "validation.jsonl")
    data = prepare(_config(tmp_path, INSTRUCT, validation=validation), tiny_tokenizer(), seed=0)
    assert (data.shared_rows, len(data.validation or ()), data.validation_counts and data.validation_counts.rows) == (3, 4, 4)


def test_the_template_is_needed_only_where_it_is_used(tmp_path):
    config = _config(tmp_path, INSTRUCT)
    with pytest.raises(ConfigError, match="no chat template"):
        prepare(config, tiny_tokenizer(chat_template=None), seed=0)
    tokenizer = tiny_tokenizer(chat_template=None)
    prepare(config.model_copy(update={"chat_template": "plain"}), tokenizer, seed=0)
    assert "eos_token" in str(tokenizer.chat_template)  # it leaves with the template, so that the exported student has it
    prepare(_config(tmp_path, [{"text": "a"}], format="text"), tiny_tokenizer(chat_template=None), seed=0)


def test_an_answer_that_ends_in_no_special_token_is_counted(tmp_path):
    template = CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}", "}}{% endgeneration %}{{- '<|im_end|>\\n' }}")
    assert template != CHATML
    assert prepare(_config(tmp_path, INSTRUCT), tiny_tokenizer(chat_template=template), seed=0).counts.unended == 20
    assert prepare(_config(tmp_path, INSTRUCT), tiny_tokenizer(), seed=0).counts.unended == 0


def test_a_preview_marks_targets_and_escapes_what_commands_a_terminal(tmp_path):
    row = {"instruction": "red \x1b[31m", "input": "", "output": "a\u202eb\n"}
    tokenizer = tiny_tokenizer()
    shown = preview(prepare(_config(tmp_path, [row]), tokenizer, seed=0).train, tokenizer)
    assert shown.pieces == [
        ("<|im_start|>user\nred \\x1b[31m<|im_end|>\n<|im_start|>assistant\n", False),
        ("a\\u202eb\n<|im_end|>", True),
        ("\n", False),
    ]
    assert shown.num_targets < shown.num_tokens
    assert printable("é漢🙂\t\x07\x9b") == "é漢🙂\t\\x07\\x9b"


def test_progress_is_silent_unless_forced(tmp_path, capsys):
    prepare(_config(tmp_path, INSTRUCT), tiny_tokenizer(), seed=0)
    assert capsys.readouterr().err == ""
    prepare(_config(tmp_path, INSTRUCT), tiny_tokenizer(), seed=0, progress=True)
    captured = capsys.readouterr()
    assert "Preparing rows" in captured.err
    assert captured.out == ""
