"""`potstill judge` on the command line: tiny chat models that write, a judge over HTTP, files for other tools, what is refused."""

import json
import re
from pathlib import Path

import pytest

from bigram_model import save_bigram
from potstill.evaluation.judging.kept_lines import KeptLines
from potstill.evaluation.judging.prompts import JudgedPrompt
from potstill.evaluation.judging.settings import WritingConfig
from potstill.evaluation.judging.writing import Author
from potstill.models.config import LoadingConfig
from potstill.reporting.page import write_report
from potstill.serving import pool
from small_recipe import potstill
from stub_judge import StubJudge, longer
from stub_server import Fault
from tiny import CHATML, save_pair

CANARY = "canaryCANARYcanaryCANARYcanary12"
INSTRUCTIONS = [{"instruction": f"Say {number}.", "dataset": "sums"} for number in range(8)]
QUESTIONS = [{"question_id": 81 + number, "category": ("writing", "math")[number % 2], "turns": [f"Say {number}.", "And again?"]}
             for number in range(6)]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run folder `kd`, a model `sft`, and prompts of both formats."""
    folder = tmp_path_factory.mktemp("judge")
    save_bigram(folder / "kd" / "student")
    (folder / "kd" / "recipe.yaml").write_text("{}")
    save_pair(folder / "sft", 1)
    (folder / "alpaca.json").write_text(json.dumps(INSTRUCTIONS))
    (folder / "mt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pool, "_FIRST_PAUSE", 0.01)
    monkeypatch.setenv("JUDGE_KEY", CANARY)


def judge(place: Path, out: Path, *more: object, stub: StubJudge | None = None, prompts: str = "alpaca.json") -> int:
    server = ("--judge", stub.url, "--judge-model", "stub-1", "--api-key-env", "JUDGE_KEY") if stub else ()
    return potstill("judge", place / "kd", f"base={place}/sft", "--prompts", place / prompts, "--folder", out, "--quiet",
                    "--set", "writing.sampling.max_new_tokens=6", "--set", "writing.device=cpu", *server, *more)  # fmt: skip


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_answers_first_and_judged_later_with_the_command_that_is_shown(place, tmp_path, capsys):
    assert judge(place, tmp_path) == 0
    shown = capsys.readouterr().out
    assert re.search(r"potstill judge \S*/kd base=\S*/sft --prompts .* --judge https://HOST --judge-model NAME --api-key-env", shown)
    assert re.search(r"alpaca_eval --model_outputs \S*/answers/kd.json --reference_outputs \S*/answers/base.json", shown)
    rows = read(tmp_path / "answers" / "kd.json")
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in INSTRUCTIONS]
    assert {(row["generator"], row["dataset"]) for row in rows} == {("kd", "sums")}
    assert {row["output"] for row in rows} == {"The answer."}, "what the bigram most likely says, without its end"
    assert not (tmp_path / "record.json").exists()
    with StubJudge(longer) as stub:
        assert judge(place, tmp_path, stub=stub) == 0
    record = read(tmp_path / "record.json")
    assert (record["kind"], record["version"], record["tasks"][0]["kind"]) == ("evaluation", 2, "judged")
    assert [model["name"] for model in record["models"]] == ["kd", "base", "judge: stub-1"]
    assert read(place / "kd" / "evaluation" / "pairs-alpaca-beside-base.json") == record, "a run folder keeps the record"
    assert "win rate" in capsys.readouterr().out
    assert write_report([place], str(tmp_path / "page.html"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]


def test_files_of_answers_are_judged_without_a_model(place, tmp_path, capsys):
    rows = [[{**row, "output": text * (1 + number % 2), "generator": name} for number, row in enumerate(INSTRUCTIONS)]
            for name, text in (("gpt-9", "x"), ("mine", "yyy"))]  # fmt: skip
    for name, content in zip(("a.json", "b.json"), rows, strict=True):
        (tmp_path / name).write_text(json.dumps(content))
    with StubJudge(longer) as stub:
        server = ["--judge", stub.url + "/v1", "--judge-model", "gpt-9-judge"]
        assert potstill("judge", tmp_path / "a.json", tmp_path / "b.json", "--folder", tmp_path / "out", "--quiet", *server) == 0
        calls = stub.calls
        assert calls == 2 * len(INSTRUCTIONS)
        assert potstill("judge", tmp_path / "a.json", tmp_path / "b.json", "--folder", tmp_path / "out", "--quiet", *server) == 0
        assert stub.calls == calls, "nothing is asked a second time"
    record = read(tmp_path / "out" / "record.json")
    assert [model["name"] for model in record["models"]] == ["gpt-9", "mine", "judge: gpt-9-judge"]
    assert record["models"][1]["metrics"]["a/win_rate"]["value"] == 1
    assert any("the judge may be kin to gpt-9 (gpt)" in warning for warning in record["warnings"])


def test_preferences_that_were_judged_elsewhere_are_read_back(tmp_path, capsys):
    rows = [[{**row, "output": f"{name} {number}", "generator": name} for number, row in enumerate(INSTRUCTIONS)] for name in ("a", "b")]
    for name, content in zip(("a.json", "b.json"), rows, strict=True):
        (tmp_path / name).write_text(json.dumps(content))
    notes = [
        {"instruction": row["instruction"], "annotator": "gpt4", "preference": preference,
         **({"output_1": f"a {n}", "output_2": f"b {n}"} if n % 2 else {"output_1": f"b {n}", "output_2": f"a {n}"})}
        for n, (row, preference) in enumerate(zip(INSTRUCTIONS, (2.0, 1.0, 1.75, 1.25, 0, 1.5, None, 1.0), strict=True))
    ]  # fmt: skip
    (tmp_path / "annotations.json").write_text(json.dumps(notes))
    arguments = [tmp_path / "a.json", tmp_path / "b.json", "--folder", tmp_path / "out", "--annotations", tmp_path / "annotations.json"]
    assert potstill("judge", *arguments) == 0
    record = read(tmp_path / "out" / "record.json")
    metrics = record["models"][0]["metrics"]
    # a's shares: 1, 1, 0.75, 0.75, 0.5, 0.5, none, 1
    assert metrics["a/win_rate_soft"]["value"] == pytest.approx(5.5 / 7)
    assert metrics["a/win_rate"]["value"] == pytest.approx(6 / 7)
    assert [model["name"] for model in record["models"]] == ["a", "b"]
    assert "1 of 8 pairs have no preference and are left out" in record["warnings"]
    assert record["title"] == "a against b, judged by gpt4"
    notes[1]["preference"] = 3
    (tmp_path / "annotations.json").write_text(json.dumps(notes))
    assert potstill("judge", *arguments) == 2
    assert "preference is 3" in capsys.readouterr().err
    (tmp_path / "annotations.json").write_text(json.dumps([{**notes[0], "output_1": "of somebody else"}]))
    assert potstill("judge", *arguments) == 2
    assert "holds no preference between the answers of a and b" in capsys.readouterr().err
    assert potstill("judge", *arguments, "--style", "grade") == 2
    assert "annotations: they are preferences between pairs" in capsys.readouterr().err


def test_two_turns_are_written_and_judged_and_fastchat_reads_them(place, tmp_path, capsys):
    assert judge(place, tmp_path, prompts="mt.jsonl") == 0
    assert "python gen_judgment.py --mode pairwise-all --model-list kd base" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "answers" / "base.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [row["question_id"] for row in QUESTIONS]
    assert all(len(line["choices"][0]["turns"]) == 2 for line in lines)
    with StubJudge(longer) as stub:
        assert judge(place, tmp_path, stub=stub, prompts="mt.jsonl") == 0
        assert len(stub.bodies) == len(QUESTIONS) * 2 * 2
    record = read(tmp_path / "record.json")
    assert [task["name"] for task in record["tasks"]] == ["mt", "mt-writing", "mt-math"]
    with StubJudge(lambda answers: f"[[{1 + len(answers[0]) % 10}]]") as stub:
        assert judge(place, tmp_path, "--style", "grade", stub=stub, prompts="mt.jsonl") == 0
    graded = read(tmp_path / "record.json")
    texts = [turn for line in lines for turn in line["choices"][0]["turns"]]
    assert graded["models"][1]["metrics"]["mt/grade"]["value"] == pytest.approx(sum(1 + len(text) % 10 for text in texts) / len(texts))


def test_a_second_turn_sees_the_models_own_first_answer(place, tmp_path):
    """A template whose prompt ends with the last answer makes the bigram go on from it; another first answer is another prompt."""
    prompts = [JudgedPrompt("0", ("Say 1.", "And again?"))]
    template = CHATML.replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n' + messages[-2]['content'][-4:-3] }}")
    assert template != CHATML
    model = LoadingConfig(path=str(place / "sft"))
    seen = []

    def author(name):
        return Author("sft", model, WritingConfig.model_validate({"sampling": {"temperature": 0.0, "max_new_tokens": 5}}),
                      KeptLines(tmp_path / name), device="cpu", precision="float32")  # fmt: skip

    first = author("a")
    real = first._rendered
    first._rendered = lambda *given: seen.append(real(*given)) or seen[-1]
    texts = first.write(prompts).texts["0"]
    told = [first._tokenizer.decode(tokens[0], skip_special_tokens=True) for tokens in seen]
    assert texts[0] not in told[0]
    assert texts[0] in told[1]
    assert told[1].index("Say 1.") < told[1].index(texts[0]) < told[1].index("And again?")


def test_answers_do_not_depend_on_their_batch_or_on_other_prompts(place, tmp_path):
    prompts = [JudgedPrompt(str(number), tuple(row["turns"]), row["category"]) for number, row in enumerate(QUESTIONS)]

    def write(name, some, **changes):
        values = {"sampling": {"temperature": 1.0, "max_new_tokens": 6}, **changes}
        author = Author("sft", LoadingConfig(path=str(place / "sft")), WritingConfig.model_validate(values), KeptLines(tmp_path / name),
                        device="cpu", precision="float32")  # fmt: skip
        return author.write(some).texts

    whole = write("a", prompts, batch_size=4)
    assert write("b", prompts, batch_size=1) == whole
    assert write("c", prompts[3:], batch_size=2) == {item: whole[item] for item in ("3", "4", "5")}
    assert write("d", prompts, seed=1) != whole
    cold = write("e", prompts, category_temperatures={"math": 0.0})
    assert {item for item in whole if cold[item] == whole[item]} == {"0", "2", "4"}, "writing is drawn as before"
    assert write("e", prompts, category_temperatures={"math": 0.0}, seed=0) == cold


def test_a_prompt_without_room_has_an_empty_answer_and_a_warning(place, tmp_path):
    long = [JudgedPrompt("0", ("word " * 600,)), JudgedPrompt("1", ("Short.",))]
    author = Author("sft", LoadingConfig(path=str(place / "sft")), WritingConfig.model_validate({"sampling": {"max_new_tokens": 4}}),
                    KeptLines(tmp_path / "kept"), device="cpu", precision="float32")  # fmt: skip
    answers = author.write(long)
    assert answers.texts["0"] == ("",)
    assert answers.texts["1"] != ("",)
    assert any("1 of 2 prompts leave no room for an answer in its 512 positions" in warning for warning in answers.warnings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{p}/kd", "--prompts", "{p}/mt.jsonl"], "a pair needs two contestants"),
        ([], "no prompts"),
        (["{p}/kd", "{p}/sft"], "no prompts: name AlpacaEval's instructions"),
        (["{p}/kd", "{p}/nowhere/x", "--prompts", "{p}/mt.jsonl"], "second.model.path: {p}/nowhere/x: no such folder"),
        (["{p}/kd", "{p}/nowhere.json", "--prompts", "{p}/mt.jsonl"], "second.answers: {p}/nowhere.json: no such file"),
        (["{p}/kd", "{p}/sft", "--prompts", "{p}/nowhere.jsonl"], "prompts: {p}/nowhere.jsonl: no such file"),
        (["{p}/kd", "{p}/sft", "--prompts", "{p}/mt.jsonl", "--style", "vote"], "style: must be"),
        (["{p}/kd", "{p}/sft", "--prompts", "{p}/mt.jsonl", "--judge", "http://x"], "judge.model: missing"),
        (["{p}/kd", "{p}/sft", "--prompts", "{p}/mt.jsonl", "--judge", "x", "--judge-model", "m"], "begins with http:// or https://"),
        (["{p}/kd", "{p}/sft", "--prompts", "{p}/mt.jsonl", "--judge", "http://x", "--judge-model", "m", "--api-key-env", "UNSET_KEY"],
         "judge.api_key_env: the environment variable UNSET_KEY is not set"),
        (["{p}/kd", "{p}/sft", "--prompts", "{p}/mt.jsonl", "--set", "judge.key=1"], "judge.key: unknown key"),
        (["{p}/kd", "kd={p}/sft", "--prompts", "{p}/mt.jsonl"], "kd: named twice"),
        (["{p}/kd", "{p}/sft", "--plan", "{p}/nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_loaded(place, capsys, arguments, said):
    assert potstill("judge", *(argument.format(p=place) for argument in arguments)) == 2
    assert said.format(p=place) in capsys.readouterr().err


def test_a_plan_says_the_same_and_the_command_line_stands_over_it(place, tmp_path, capsys):
    with StubJudge(longer) as stub:
        (tmp_path / "plan.yaml").write_text(f"""
first: {place}/kd
second: {{name: base, model: {{path: {place}/sft}}}}
prompts: {place}/alpaca.json
folder: {tmp_path}/elsewhere
limit: 4
writing: {{sampling: {{temperature: 0.0, max_new_tokens: 6}}, device: cpu}}
judge: {{url: '{stub.url}', model: stub-1, api_key_env: JUDGE_KEY}}
""")
        assert potstill("judge", "--plan", tmp_path / "plan.yaml", "--folder", tmp_path / "here", "--quiet") == 0
    assert not (tmp_path / "elsewhere").exists()
    assert len(read(tmp_path / "here" / "answers" / "kd.json")) == 4


def test_an_outage_is_gone_on_from_with_the_same_command(place, tmp_path, capsys):
    with StubJudge(longer, lambda number, body: Fault(status=503) if number > 5 else None) as stub:
        alone = ("--set", "judge.concurrency=1")  # of several under way the others may be answered when it ends
        assert judge(place, tmp_path, "--set", "judge.max_outage_seconds=0", *alone, stub=stub) == 75
        first, port = stub.questions, stub.port
    assert 0 < len((tmp_path / "judgments.jsonl").read_text().splitlines()) < 16
    assert not (tmp_path / "record.json").exists()
    with StubJudge(longer, port=port) as stub:
        assert judge(place, tmp_path, *alone, stub=stub) == 0
        assert max((first + stub.questions).values()) == 1
    shown = capsys.readouterr()
    assert "canary" not in shown.out + shown.err


def test_a_tokenizer_without_a_template_is_refused(place, tmp_path, capsys):
    save_pair(tmp_path / "plain", 2)
    for file in (tmp_path / "plain").glob("chat_template*"):
        file.unlink()
    config = tmp_path / "plain" / "tokenizer_config.json"
    config.write_text(json.dumps({key: value for key, value in read(config).items() if key != "chat_template"}))
    assert potstill("judge", f"first={tmp_path}/plain", place / "kd", "--prompts", place / "alpaca.json", "--folder", tmp_path / "out") == 2
    assert "has no chat template" in capsys.readouterr().err
