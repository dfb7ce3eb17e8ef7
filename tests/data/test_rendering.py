"""Golden renders of real and small templates: exactly what the assistant writes is a target, its end-of-turn token included."""

import copy
import gzip
import itertools
import json
from functools import lru_cache
from pathlib import Path

import pytest

from potstill.data.formats import Conversation, PlainText, PromptCompletion
from potstill.data.lines import RowFault
from potstill.data.rendering import Renderer
from potstill.data.templates import settle_template
from potstill.errors import ConfigError, DataError
from tiny import CHATML, CHATML_WITHOUT_MASK, tiny_tokenizer

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "It is 4"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]

# What each template makes of TURNS, with the targets between « and ».
CHATML_GOLDEN = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n<|im_start|>user\n2+2?<|im_end|>\n"
    "<|im_start|>assistant\n«It is 4<|im_end|>»\n"
)
GOLDEN = {
    "llama2": "<s> [INST] Hi [/INST]« Hello. </s>»<s> [INST] 2+2? [/INST]« It is 4 </s>»",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "«Hello.<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "«It is 4<|eot_id|>»",
    "qwen2": CHATML_GOLDEN,
    "tiny with marks": CHATML_GOLDEN,
    "tiny without marks": CHATML_GOLDEN,
    "tiny, pad is EOS": CHATML_GOLDEN,
    "tiny that adds BOS": "<|endoftext|>" + CHATML_GOLDEN,
    "named chatml": CHATML_GOLDEN,
    "named plain": "Hi\n«Hello.<|im_end|>»2+2?\n«It is 4<|im_end|>»",
    "named alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nHi\n\n### Response:\n«Hello.<|im_end|>»\n\n### Instruction:\n2+2?\n\n### Response:\n«It is 4<|im_end|>»",
    "gpt2, named plain": "Hi\n«Hello.<|endoftext|>»2+2?\n«It is 4<|endoftext|>»",
    "stories, named plain": "<s> Hi\n«Hello.</s>» 2+2?\n«It is 4</s>»",
}


def _adding_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    return tokenizer


@lru_cache
def _loaded(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _tokenizer(name: str, request):
    if name.startswith(("tiny", "named")):
        tokenizer = tiny_tokenizer(chat_template=CHATML_WITHOUT_MASK if name == "tiny without marks" else CHATML)
        if name == "tiny, pad is EOS":
            tokenizer.pad_token = tokenizer.eos_token
        if name == "tiny that adds BOS":
            tokenizer = _adding_bos(tokenizer)
            settle_template(tokenizer, "chatml")
    else:
        data = request.getfixturevalue("shared_data")
        folder = (
            data / "models/stories260K-llama-hf" if name.startswith("stories") else data / "tokenizers" / name.partition(",")[0]
        )
        tokenizer = copy.deepcopy(_loaded(folder)) if "named" in name else _loaded(folder)
    if "named" in name:
        settle_template(tokenizer, name.rpartition(" ")[2])
    return tokenizer


def _shown(tokenizer, rendered) -> str:
    """The tokens decoded run by run, the targets between « and »."""
    ends = [0, *(end for span in rendered.spans for end in span), len(rendered.tokens)]
    runs = [tokenizer.decode(rendered.tokens[start:end]) for start, end in itertools.pairwise(ends)]
    return "".join(f"«{run}»" if number % 2 else run for number, run in enumerate(runs))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, request):
    tokenizer = _tokenizer(name, request)
    (rendered,) = Renderer(tokenizer).render([Conversation(TURNS)])
    shown, golden = _shown(tokenizer, rendered), GOLDEN[name]
    if name in ("llama2", "stories, named plain"):  # a SentencePiece decoder drops or writes the space that begins a piece
        shown, golden = shown.replace(" ", ""), golden.replace(" ", "")
    assert shown == golden
    assert rendered.tokens == tokenizer.apply_chat_template(TURNS)["input_ids"]  # nothing differs from what inference sees
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id and name != "llama2":
        assert rendered.tokens.count(tokenizer.bos_token_id) == (1 if golden.startswith(str(tokenizer.bos_token)) else 0)
    for _, end in rendered.spans:
        assert tokenizer.decode(rendered.tokens[end - 1]).strip() in ("</s>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    "name", ["tiny with marks", "tiny that adds BOS", "named chatml", "named plain", "named alpaca", "gpt2, named plain"]
)
def test_marks_are_those_of_transformers(name, request):
    tokenizer = _tokenizer(name, request)
    for turns in (TURNS, SYSTEM, TURNS[:2], [*TURNS[:3], {"role": "assistant", "content": "漢字 🙂"}]):
        (rendered,) = Renderer(tokenizer).render([Conversation(turns)])
        theirs = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
        mask = [0] * len(rendered.tokens)
        for start, end in rendered.spans:
            mask[start:end] = [1] * (end - start)
        assert rendered.tokens == theirs["input_ids"]
        assert mask == theirs["assistant_masks"]


def test_with_and_without_marks_agree():
    with_marks, without = (Renderer(tiny_tokenizer(chat_template=template)) for template in (CHATML, CHATML_WITHOUT_MASK))
    items = [Conversation(turns) for turns in (TURNS, SYSTEM, TURNS[:2], TURNS[1:], [*TURNS, TURNS[1], TURNS[0]])]
    assert with_marks.render(items) == without.render(items)


MARKED_INSIDE_A_WORD = (
    "{{- messages[0]['content'] + '<|im_start|>The ans' }}"
    "{% generation %}{{- messages[1]['content'] }}{% endgeneration %}{{- 'wer' }}"
)


def test_a_token_that_straddles_an_end_of_an_answer():
    """ "The ans|wer" is one token: marks count it as inside, as transformers does; without marks the row is refused."""
    tokenizer = tiny_tokenizer(400, chat_template=MARKED_INSIDE_A_WORD)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "wer 1. The ans"}]
    (rendered,) = Renderer(tokenizer).render([Conversation(turns)])
    theirs = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    ((start, end),) = rendered.spans
    assert [start <= position < end for position in range(len(rendered.tokens))] == [
        bool(mark) for mark in theirs["assistant_masks"]
    ]
    assert tokenizer.decode(rendered.tokens[start:end]).strip() not in ("wer 1. The ans", "")
    tokenizer.chat_template = (
        "{{- messages[0]['content'] + '<|im_start|>' }}{%- if add_generation_prompt or messages | length > 1 %}{{- 'The ans' }}{%- endif %}"
        "{%- if messages | length > 1 %}{{- messages[1]['content'] }}{%- endif %}"
    )
    (fault,) = Renderer(tokenizer).render([Conversation(turns)])
    assert isinstance(fault, RowFault)
    assert "not the first tokens of the whole" in str(fault)


DOES_NOT_NEST = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' and not loop.last %}{{- 'earlier: ' }}{%- endif %}"
    "{{- message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def test_a_template_that_does_not_nest_is_refused_with_the_first_difference():
    renderer = Renderer(tiny_tokenizer(chat_template=DOES_NOT_NEST))
    several, one = renderer.render([Conversation(TURNS), Conversation(TURNS[:2])])
    assert isinstance(several, RowFault)
    assert "does not nest" in str(several)
    assert "'Hello.<|im_end|>" in str(several)
    assert "'earlier: Hello." in str(several)
    assert not isinstance(one, RowFault)


@pytest.mark.parametrize(
    "template",
    [
        "{%- for message in messages %}{%- if message['role'] != 'assistant' %}{{- message['content'] + '\\n' }}{%- endif %}{%- endfor %}",
        CHATML_WITHOUT_MASK.replace(
            "{%- if add_generation_prompt", "{% generation %}{% endgeneration %}{%- if add_generation_prompt"
        ),
    ],
    ids=["renders no assistant", "marks nothing"],
)
def test_a_template_that_marks_nothing_raises(template):
    with pytest.raises(DataError, match="marks no token"):
        Renderer(tiny_tokenizer(chat_template=template)).render([Conversation(TURNS)])


def test_a_header_that_is_no_generation_prompt_raises():
    template = "{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '<|im_end|>' }}{%- endfor %}"
    with pytest.raises(DataError, match="'assistant: ' before an answer"):
        Renderer(tiny_tokenizer(chat_template=template)).render([Conversation(TURNS)])


def test_a_template_that_refuses_roles_refuses_the_row_and_not_the_rest():
    template = CHATML.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}{%- if message['role'] == 'tool' %}{{- raise_exception('no tools here') }}{%- endif %}",
        1,
    )
    bad, good = Renderer(tiny_tokenizer(chat_template=template)).render(
        [Conversation([{"role": "tool", "content": "x"}, *TURNS]), Conversation(TURNS)]
    )
    assert isinstance(bad, RowFault)
    assert "no tools here" in str(bad)
    assert not isinstance(good, RowFault)


def test_an_empty_answer_is_no_target_and_leaves_the_others():
    for template in (CHATML, CHATML_WITHOUT_MASK):
        tokenizer = tiny_tokenizer(chat_template=template)
        turns = [TURNS[0], {"role": "assistant", "content": " \n"}, *TURNS[2:]]
        one, none = Renderer(tokenizer).render([Conversation(turns), Conversation(turns[:2])])
        assert [tokenizer.decode(one.tokens[start:end]) for start, end in one.spans] == ["It is 4<|im_end|>"]
        assert none.spans == []


def test_an_end_of_turn_that_is_marked_apart_stays_a_target():
    end = "{% generation %}{{- '<|im_end|>' }}{% endgeneration %}"
    apart = CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}" + end)
    assert apart != CHATML
    tokenizer = tiny_tokenizer(chat_template=apart)
    silent = [TURNS[0], {"role": "assistant", "content": ""}, *TURNS[2:]]
    full, empty = Renderer(tokenizer).render([Conversation(TURNS), Conversation(silent)])
    assert [tokenizer.decode(full.tokens[start:end]) for start, end in full.spans] == ["Hello.", "<|im_end|>", "It is 4", "<|im_end|>"]
    assert [tokenizer.decode(empty.tokens[start:end]) for start, end in empty.spans] == ["It is 4", "<|im_end|>"]


def test_no_template_is_a_clear_error_and_names_the_defaults():
    with pytest.raises(ConfigError, match=r"no chat template; set data\.chat_template to chatml, alpaca, plain"):
        settle_template(tiny_tokenizer(chat_template=None), None)
    with pytest.raises(ConfigError, match="no template is called 'chatlm'"):
        settle_template(tiny_tokenizer(), "chatlm")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has none"):
        settle_template(tokenizer, "plain")


def test_chatml_without_its_tokens_is_refused(shared_data):
    with pytest.raises(ConfigError, match=r"needs the special tokens <\|im_start\|> and <\|im_end\|>"):
        settle_template(_loaded(shared_data / "tokenizers/gpt2"), "chatml")


def test_a_template_from_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML, encoding="utf-8")
    tokenizer = tiny_tokenizer(chat_template=None)
    settle_template(tokenizer, str(tmp_path / "own.jinja"))
    assert tokenizer.chat_template == CHATML
    with pytest.raises(ConfigError, match=r"other\.jinja cannot be read"):
        settle_template(tokenizer, str(tmp_path / "other.jinja"))


def test_system_and_tools_pass_through():
    template = "{%- if tools %}{{- 'tools: ' + (tools | tojson) + '\\n' }}{%- endif %}" + CHATML
    tokenizer = tiny_tokenizer(chat_template=template)
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
    (rendered,) = Renderer(tokenizer).render([Conversation(SYSTEM, [tool])])
    assert rendered.tokens == tokenizer.apply_chat_template(SYSTEM, tools=[tool])["input_ids"]
    assert tokenizer.decode(rendered.tokens).startswith('tools: [{"type": "function", "function": {"name": "add"')
    assert len(rendered.spans) == 2


def test_the_day_does_not_change_the_tokens():
    date = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{{- date_string }}"
    template = date + CHATML
    tokenizer = tiny_tokenizer(chat_template=template)
    (rendered,) = Renderer(tokenizer).render([Conversation(TURNS)])
    assert tokenizer.decode(rendered.tokens).startswith("26 Jul 2024<|im_start|>")
    tokenizer.chat_template = "\n{{- strftime_now('%Y-%m-%d') }}, {{ strftime_now('%d %B %Y') }}: " + CHATML
    (rendered,) = Renderer(tokenizer).render([Conversation(TURNS)])
    assert tokenizer.decode(rendered.tokens).startswith("2024-07-26, 26 July 2024:<|im_start|>user\nHi")
    tokenizer.chat_template = "\n {% if false %}{{ strftime_now('%Y') }}{% endif %} x" + CHATML  # white space too stays
    (rendered,) = Renderer(tokenizer).render([Conversation(TURNS)])
    assert rendered.tokens == tokenizer.apply_chat_template(TURNS)["input_ids"]
    tokenizer.chat_template = template
    (rendered,) = Renderer(tokenizer, template_variables={"date_string": "1 Jan 2030"}).render([Conversation(TURNS)])
    assert tokenizer.decode(rendered.tokens).startswith("1 Jan 2030<|im_start|>")


@pytest.mark.parametrize("name", ["tiny with marks", "tiny that adds BOS"])
def test_text_and_prompt_completion_get_the_tokenizers_bos_and_one_eos(name, request):
    tokenizer = _tokenizer(name, request)
    bos = "<|endoftext|>" if "BOS" in name else ""
    text, pair, nothing = Renderer(tokenizer).render(
        [PlainText("A story."), PromptCompletion("2+2=", "4"), PromptCompletion("2+2=", " ")]
    )
    assert _shown(tokenizer, text) == f"{bos}«A story.<|im_end|>»"
    assert _shown(tokenizer, pair) == f"{bos}2+2=«4<|im_end|>»"
    assert nothing.spans == []


def test_a_completion_that_grows_into_its_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    joined, apart = Renderer(tokenizer).render([PromptCompletion("The ans", "wer is 42"), PromptCompletion("The answer", " is 42")])
    assert isinstance(joined, RowFault)
    assert "not the first tokens of the whole" in str(joined)
    assert not isinstance(apart, RowFault)


def test_end_of_text_serves_a_tokenizer_without_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    (text,) = Renderer(tokenizer, end_of_text=(0,)).render([PlainText("A story.")])
    assert text.tokens[-1] == 0
    assert text.spans == [(0, len(text.tokens))]
    text, pair = Renderer(tokenizer).render([PlainText("A story."), PromptCompletion("2+2=", "4")])
    assert _shown(tokenizer, text) == "«A story.»"
    assert _shown(tokenizer, pair) == "2+2=«4»"


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_real_conversations_with_tools(name, request, shared_data):
    """Every multi-turn row renders, its targets are its assistant's turns word for word, and tool turns are none."""
    tokenizer = _tokenizer(name, request)
    with gzip.open(shared_data / "instruct/glaive_toolcall_multiturn.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    for row, rendered in zip(rows, Renderer(tokenizer).render([Conversation(row["messages"]) for row in rows]), strict=True):
        assert not isinstance(rendered, RowFault)
        answers = [message["content"].strip() + end for message in row["messages"] if message["role"] == "assistant"]
        assert [tokenizer.decode(rendered.tokens[start:stop]).strip() for start, stop in rendered.spans] == answers


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen2"])
def test_real_instructions_have_the_ids_of_transformers(name, request, shared_data):
    tokenizer = _tokenizer(name, request)
    with gzip.open(shared_data / "instruct/alpaca_52k.train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for line in itertools.islice(file, 400) if (row := json.loads(line))["output"].strip()]
    prompts = [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"} for row in rows]
    turns = [[prompt, {"role": "assistant", "content": row["output"]}] for prompt, row in zip(prompts, rows, strict=True)]
    end = tokenizer.eos_token
    for conversation, rendered in zip(turns, Renderer(tokenizer).render([Conversation(one) for one in turns]), strict=True):
        assert rendered.tokens == tokenizer.apply_chat_template(conversation)["input_ids"]
        ((start, stop),) = rendered.spans
        answer = tokenizer.decode(rendered.tokens[start:stop])
        assert answer.replace(" ", "") == (conversation[1]["content"] + end).replace(" ", "")
        assert rendered.tokens[:start] == tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True)["input_ids"]
