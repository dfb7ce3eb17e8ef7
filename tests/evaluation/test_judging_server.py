"""A judge behind a real HTTP server: rules that are known, answers that are none, refusals, failures; each question paid for once."""

import json
import logging
import time

import pytest

from potstill.errors import OutageError, ServerError
from potstill.evaluation.judging.answers import Answers
from potstill.evaluation.judging.asking import Judge
from potstill.evaluation.judging.kept_lines import KeptLines
from potstill.evaluation.judging.matches import graded_answers, pair_matches
from potstill.evaluation.judging.prompts import JudgedPrompt
from potstill.evaluation.judging.questions import grade_questions, pair_questions
from potstill.evaluation.judging.settings import JudgeConfig
from potstill.evaluation.judging.summary import Judged, grades_record, pairs_record
from potstill.serving import pool
from stub_judge import StubJudge, always_first, better, longer
from stub_server import Fault

CANARY = "canaryCANARYcanaryCANARYcanary12"
ITEMS = 20
PROMPTS = [JudgedPrompt(str(item), (f"Question {item}?", "And now?"), category="ab"[item % 2]) for item in range(ITEMS)]


def quality(text: str) -> float:
    return float(text.split("=")[1].split()[0])


# The first is better in 14 of 20 prompts, always by q; in prompts 0 and 1 both answer alike.
KD = Answers("kd", {str(i): (f"q={i} kd", f"q={i} kd again") if i > 1 else ("same", "same") for i in range(ITEMS)})
SFT = Answers("sft", {str(i): (f"q={i + (1 if i < 6 else -1)} sft!", f"q={i + (1 if i < 6 else -1)} sft again!") if i > 1
                      else ("same", "same") for i in range(ITEMS)})  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pool, "_FIRST_PAUSE", 0.01)


def ask(stub, path, **changes):
    """The record, and the judge's lines."""
    config = JudgeConfig(**{"url": stub.url, "model": "stub-1", "max_outage_seconds": 5, **changes})
    questions = pair_questions(PROMPTS, KD, SFT)
    judge = Judge(config, "pairs", KeptLines(path / "judgments.jsonl"))
    try:
        judge.ask(questions)
        judged = Judged("mt", "judge: stub-1", PROMPTS, (KD, SFT), {})
        record = pairs_record(judged, pair_matches(PROMPTS, KD, SFT, questions, judge.heard)).to_json()
    finally:
        judge.close()
    return record, [json.loads(line) for line in (path / "judgments.jsonl").read_text().splitlines()]


def value(record, name, model=0):
    return record["models"][model]["metrics"][f"mt/{name}"]["value"]


def test_a_judge_that_knows_is_believed(tmp_path):
    with StubJudge(better(quality)) as stub:
        record, lines = ask(stub, tmp_path)
    assert value(record, "win_rate") == value(record, "win_rate_soft") == (14 + 2 / 2) / 20
    assert value(record, "first_place", 2) == 0.5
    assert value(record, "orders_agree", 2) == 1
    assert len(lines) == len(stub.questions) == stub.calls == (ITEMS - 2) * 2 * 2, "equal answers are not asked about"
    assert record["models"][0]["metrics"]["mt-a/win_rate"]["num_clusters"] == 10
    primary = record["comparisons"][0]
    assert (primary["metric"], primary["family"], primary["family_size"]) == ("mt/win_rate", "primary", 1)
    assert primary["p_value"] == pytest.approx((1 + 18 + 153 + 816 + 3060) / 2**17), "the sign test: 4 of 18 prompts for the other one"
    assert primary["is_significant"]
    assert not record["warnings"]
    assert stub.most_under_way <= 8


def test_a_judge_that_always_prefers_the_first_place_is_found_out(tmp_path):
    with StubJudge(always_first) as stub:
        record, _ = ask(stub, tmp_path)
    assert value(record, "win_rate") == value(record, "win_rate_soft") == 0.5
    assert value(record, "first_place", 2) == 1
    assert value(record, "orders_agree", 2) == 0
    assert not record["comparisons"][0]["is_significant"]
    assert any("prefers the answer that is shown first: 100% of 72 verdicts" in warning for warning in record["warnings"])
    assert any("contradicts itself: in 36 of 36 pairs" in warning for warning in record["warnings"])


def test_a_judge_that_prefers_length_shows_it(tmp_path):
    with StubJudge(longer) as stub:
        record, _ = ask(stub, tmp_path)
    assert value(record, "longer_wins", 2) == 1
    assert value(record, "win_rate_shorter") == 0
    assert value(record, "win_rate") == 0.5 * 2 / ITEMS
    assert record["comparisons"][0]["is_significant"]


@pytest.mark.parametrize(
    "said", ["", "I cannot decide.", "[[A]] or [[B]]", "<html><body>Bad gateway</body></html>", "ignore all that \x1b[2J", "[[" * 5000]
)
def test_what_is_no_verdict_is_asked_again_and_never_a_tie(tmp_path, said):
    with StubJudge(lambda answers: said) as stub:
        record, lines = ask(stub, tmp_path, tries=2)
    assert value(record, "win_rate") == 0.5, "of the two pairs that are word for word alike"
    assert record["models"][0]["metrics"]["mt/win_rate"]["count"] == 4
    assert value(record, "no_verdict", 2) == 1
    assert stub.calls == len(lines) == 2 * 72
    assert "72 of 72 questions to the judge got no verdict; 36 of 40 comparisons are left out" in record["warnings"]
    assert {line["try"] for line in lines} == {1, 2}
    assert all(line["verdict"] is None and line["answer"] == said for line in lines)
    reminded = [body for body in stub.bodies if len(body["messages"]) > 2]
    assert len(reminded) == (72 if said.strip() else 0), "an empty text is nothing to be reminded of"
    with StubJudge(better(quality)) as again:
        assert ask(again, tmp_path, tries=2)[0] == record
        assert again.calls == 0


def test_a_reminder_mends_what_can_be_mended(tmp_path):
    def forgetful(number, body):
        return None if len(body["messages"]) > 2 else Fault(mutate=lambda answer: {**answer, "choices": [
            {**answer["choices"][0], "message": {"role": "assistant", "content": "The better one is clear."}}]})  # fmt: skip

    with StubJudge(better(quality), forgetful) as stub:
        record, lines = ask(stub, tmp_path)
    assert value(record, "win_rate") == 0.75
    assert value(record, "no_verdict", 2) == 0
    assert stub.calls == len(lines) == 2 * 72
    assert stub.bodies[-1]["messages"][2] == {"role": "assistant", "content": "The better one is clear."}


@pytest.mark.parametrize("content", [None, "left out"])
def test_a_message_without_text_is_an_answer_without_a_verdict(tmp_path, content):
    def silent(number, body):
        message = {"role": "assistant", "refusal": "no"} | ({"content": None} if content is None else {})
        return Fault(mutate=lambda answer: {**answer, "choices": [{**answer["choices"][0], "message": message}]})

    with StubJudge(always_first, silent) as stub:
        record, _ = ask(stub, tmp_path, tries=1)
    assert value(record, "no_verdict", 2) == 1


def test_failures_that_pass_cost_no_verdict(tmp_path):
    def stumbling(number, body):
        return {0: Fault(status=500), 3: Fault(status=429, headers={"Retry-After": "0"}), 5: Fault(drop=True), 8: Fault(status=503),
                13: Fault(body=b"<html>502 Bad Gateway</html>"), 17: Fault(body=b'{"choices": []}'), 21: Fault(body=b""),
                30: Fault(delay=0.5)}.get(number)  # fmt: skip

    with StubJudge(better(quality), stumbling) as stub:
        record, lines = ask(stub, tmp_path)
    assert value(record, "win_rate") == 0.75
    assert len(lines) == 72
    assert max(stub.questions.values()) == 1, "a question that was answered is not asked again"


def test_a_server_that_stays_away_ends_it_and_what_was_heard_stays(tmp_path):
    with StubJudge(better(quality), lambda number, body: Fault(status=503) if number >= 30 else None) as stub:
        with pytest.raises(OutageError, match="run the same command again"):
            ask(stub, tmp_path, max_outage_seconds=0.3, concurrency=1)
        first = stub.questions
    kept = len((tmp_path / "judgments.jsonl").read_text().splitlines())
    assert kept == 30
    with StubJudge(better(quality)) as stub:
        record, lines = ask(stub, tmp_path)
        assert max((first + stub.questions).values()) == 1
    assert value(record, "win_rate") == 0.75
    assert len(lines) == 72


def test_one_question_that_is_refused_is_kept_as_such_and_the_others_go_on(tmp_path):
    def too_long(number, body):
        about = body["messages"][1]["content"]
        return Fault(status=400, body=b'{"error": {"message": "maximum context length"}}') if "Question 7?" in about else None

    with StubJudge(better(quality), too_long) as stub:
        record, lines = ask(stub, tmp_path)
        calls = stub.calls
        assert ask(stub, tmp_path)[0] == record
        assert stub.calls == calls, "what was refused is settled"
    assert value(record, "no_verdict", 2) == pytest.approx(4 / 72)
    refused = [line for line in lines if "refused" in line]
    assert len(refused) == 4
    assert all("maximum context length" in line["refused"] and line["verdict"] is None for line in refused)


@pytest.mark.parametrize(
    ("fault", "said", "most"),
    [
        (Fault(status=400, body=b'{"error": {"message": "temperature is not supported"}}'), r"judge.body='\{temperature: null\}'", 3),
        (Fault(status=401, body=b'{"error": {"message": "bad key"}}'), "check the key: judge.api_key_env", 1),
        (Fault(status=404, body=b'{"error": {"message": "no such model"}}'), "check judge.url and judge.model", 1),
        (Fault(status=302, headers={"Location": "http://127.0.0.1:9/"}), "no redirect is followed", 1),
        (Fault(body=b"<html>A login page</html>"), "is judge.url an OpenAI-compatible server", 4),
    ],
)
def test_a_server_that_refuses_everything_is_not_asked_everything(tmp_path, fault, said, most):
    with StubJudge(always_first, lambda number, body: fault) as stub, pytest.raises(ServerError, match=said):
        ask(stub, tmp_path)
    assert stub.calls <= most
    assert not (tmp_path / "judgments.jsonl").exists()


def test_a_slow_judge_is_waited_for_side_by_side(tmp_path):
    began = time.monotonic()
    with StubJudge(better(quality), lambda number, body: Fault(delay=0.1)) as stub:
        record, _ = ask(stub, tmp_path, concurrency=16)
    assert value(record, "win_rate") == 0.75
    assert stub.most_under_way > 4
    assert time.monotonic() - began < 72 * 0.1, "one after another they would take longer"


def test_the_key_is_nowhere_but_in_the_header(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    caplog.set_level(logging.DEBUG)

    def telling(number, body):
        if number == 0:
            return Fault(status=503, body=f"the key {CANARY} is tired".encode())
        return Fault(mutate=lambda answer: {**answer, "choices": [{**answer["choices"][0], "message": {
            "role": "assistant", "content": f"Your header says {CANARY}. [[A]]"}}]})  # fmt: skip

    with StubJudge(always_first, telling) as stub:
        record, lines = ask(stub, tmp_path, api_key_env="JUDGE_KEY")
        assert stub.headers[0]["Authorization"] == f"Bearer {CANARY}"
    assert lines[0]["answer"] == "Your header says ***. [[A]]"
    assert "canary" not in json.dumps(record) + caplog.text
    assert "canary" not in (tmp_path / "judgments.jsonl").read_text()


def test_grades_are_asked_one_by_one(tmp_path):
    def grader(answers):
        (only,) = answers
        return f"Fine. [[{1 + int(quality(only)) % 10}]]" if only.startswith("q=") else "No idea."

    questions = grade_questions(PROMPTS, [KD, SFT])
    with StubJudge(grader) as stub:
        judge = Judge(JudgeConfig(url=stub.url, model="stub-1", tries=1), "grade", KeptLines(tmp_path / "judgments.jsonl"))
        try:
            judge.ask(questions)
            graded = graded_answers(PROMPTS, [KD, SFT], questions, judge.heard)
        finally:
            judge.close()
        # Four answers of each are the same words to the same prompt, so that they are one question.
        assert stub.calls == ITEMS * 2 * 2 - 4
    record = grades_record(Judged("mt", "judge: stub-1", PROMPTS, (KD, SFT), {}), graded).to_json()
    expected = [1 + (i + (1 if i < 6 else -1)) % 10 for i in range(2, ITEMS)]
    assert value(record, "grade", 1) == pytest.approx(sum(expected) / len(expected))
    assert value(record, "grade") == pytest.approx(sum(1 + i % 10 for i in range(2, ITEMS)) / 18)
    assert record["models"][0]["metrics"]["mt/grade"]["count"] == 36
    assert "8 of 80 questions to the judge got no verdict; 4 of 40 turns are left out" in record["warnings"]
