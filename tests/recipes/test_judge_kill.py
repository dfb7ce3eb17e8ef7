"""A judging that is killed and gone on with: the record of the unbroken one, no answer written and no question asked twice."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from command_runs import Server
from stub_judge import StubJudge, longer
from stub_server import Fault
from tiny import save_pair

CONCURRENCY = 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judgings")
    save_pair(folder / "kd", 0)
    save_pair(folder / "sft", 1)
    rows = [{"question_id": row, "category": ("a", "b")[row % 2], "turns": [f"Say {row}", "Again"]} for row in range(5)]
    (folder / "mt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = Server(folder)
    yield server
    server.close()


def judge(server: Server, out: Path, stub: StubJudge, **moment) -> int:
    arguments = ["judge", f"{server.folder}/kd", f"{server.folder}/sft", "--prompts", f"{server.folder}/mt.jsonl", "--folder", str(out),
                 "--judge", stub.url, "--judge-model", "stub-1", "--quiet", "--set", f"judge.concurrency={CONCURRENCY}",
                 "--set", "writing.sampling.max_new_tokens=5", "--set", "writing.batch_size=2", "--set", "writing.device=cpu"]  # fmt: skip
    return server.command(out, arguments, **moment)


def left(out: Path) -> dict[str, object]:
    """What a run leaves, lines in any order: answers of the judge come as they come."""
    files = {path.name: path.read_bytes() for path in (out / "answers").iterdir() if not path.name.endswith(".written.jsonl")}
    lines = Counter((out / "judgments.jsonl").read_text().splitlines())
    record = json.loads((out / "record.json").read_text())
    for value in (record["tasks"][0]["data"],):
        value.pop("judge url")
    return {"answers": files, "lines": lines, "record": record}


@pytest.fixture(scope="module")
def unbroken(server):
    out = server.folder / "unbroken"
    with StubJudge(longer) as stub:
        assert judge(server, out, stub) == 0, server.log(out).read_text()
        assert max(stub.questions.values()) == 1
    return left(out)


@pytest.mark.parametrize(
    ("at", "number"),
    [("drawing", 3), ("operation", 9), ("operation", 44), ("operation", 57), ("operation", 84),
     *(pytest.param("operation", number, marks=pytest.mark.slow) for number in range(1, 100, 3))],
)  # fmt: skip
def test_killed_anywhere_it_goes_on_to_the_same_record(server, unbroken, at, number):
    out = server.folder / f"{at}-{number}"
    asked: Counter[str] = Counter()
    with StubJudge(longer) as stub:
        status = judge(server, out, stub, at=at, number=number)
        assert status in (-signal.SIGKILL, 0)
        asked += stub.questions
    with StubJudge(longer) as stub:
        assert judge(server, out, stub) == 0, server.log(out).read_text()
        asked += stub.questions
    assert left(out) == unbroken
    again = sum(count - 1 for count in asked.values())
    assert again <= CONCURRENCY, "only what was under way when it was killed is asked for again"
    written = [json.loads(line)["key"] for path in (out / "answers").glob("*.written.jsonl") for line in path.read_text().splitlines()]
    assert len(written) == len(set(written)) == 20


def test_a_signal_while_the_judge_is_asked_keeps_what_it_said(server, unbroken):
    out = server.folder / "stopped"
    with StubJudge(longer, lambda number, body: Fault(delay=0.3)) as stub:
        status = judge(server, out, stub, at="operation", number=55, action=signal.SIGTERM)
    said = server.log(out).read_text()
    assert status == 128 + signal.SIGTERM, said
    assert "every answer of the judge is kept" in said
    assert 0 < len((out / "judgments.jsonl").read_text().splitlines()) < 20
    assert "Traceback" not in said
    with StubJudge(longer) as stub:
        assert judge(server, out, stub) == 0
    assert left(out) == unbroken
