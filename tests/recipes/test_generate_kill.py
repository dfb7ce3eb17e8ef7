"""A generation that is killed, stopped and gone on with: the file of the unbroken one byte for byte, and nothing asked twice."""

import json
import signal
from pathlib import Path

import pytest

from bigram_model import save_bigram
from command_runs import Server
from tiny import save_pair

ROWS, SAMPLES, BATCH = 5, 2, 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generations")
    save_bigram(folder / "teacher")
    save_pair(folder / "student", 0)
    rows = [{"instruction": f"Add {row} and 1", "input": "", "output": str(row + 1)} for row in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(f"""
student: {{path: {folder}/student}}
teacher: {{path: {folder}/teacher}}
data: {{train: {folder}/rows.jsonl, max_tokens: 96}}
training: {{steps: 1, precision: float32}}
run: {{folder: {folder}/run}}
generate: {{path: {folder}/unset.jsonl, samples: {SAMPLES}, batch_size: {BATCH}, sampling: {{max_new_tokens: 6}}, filters: {{same: keep}}}}
""")
    server = Server(folder)
    yield server
    server.close()


def generate(server: Server, path: Path, **moment) -> int:
    arguments = ["generate", str(server.folder / "recipe.yaml"), f"generate.path={path}", f"generate.dropped={path}.dropped.jsonl",
                 "--quiet"]  # fmt: skip
    return server.command(path, arguments, **moment)


def files(path: Path) -> list[bytes]:
    return [path.with_name(path.name + suffix).read_bytes() for suffix in ("", ".counts.json", ".dropped.jsonl")]


def committed(path: Path) -> list[list[int]]:
    """[row, sample] of every answer in the folder, in the order of the files and lines."""
    found = []
    for file in sorted(path.with_name(path.name + ".answers").glob("answers-*")):
        for line in file.read_text().split("\n"):
            if line.endswith("}"):
                found += [answer[:2] for answer in json.loads(line)["answers"]]
    return found


@pytest.fixture(scope="module")
def unbroken(server) -> list[bytes]:
    path = server.folder / "unbroken.jsonl"
    assert generate(server, path) == 0, server.log(path).read_text()
    return files(path)


@pytest.mark.parametrize(
    ("at", "number"),
    [("operation", 3), ("operation", 9), ("operation", 14), ("drawing", 1), ("drawing", 7), ("operation", 33),
     *(pytest.param("operation", number, marks=pytest.mark.slow) for number in range(1, 50))],
)  # fmt: skip
def test_killed_anywhere_it_goes_on_to_the_same_bytes(server, unbroken, at, number):
    path = server.folder / f"{at}-{number}.jsonl"
    for _ in range(2):  # killed twice at the same place, the second time of what is left
        status = generate(server, path, at=at, number=number)
        assert status in (-signal.SIGKILL, 0)
    assert generate(server, path) == 0, server.log(path).read_text()
    assert files(path) == unbroken
    assert sorted(committed(path)) == [[row, sample] for row in range(ROWS) for sample in range(SAMPLES)]


def test_a_signal_in_the_middle_of_an_answer_commits_what_is_written(server, unbroken):
    path = server.folder / "stopped.jsonl"
    assert generate(server, path, at="drawing", number=8, action=signal.SIGTERM) == 128 + signal.SIGTERM
    said = server.log(path).read_text()
    assert "answers were written and are committed, the same command writes the rest" in said
    assert "Traceback" not in said
    done = len(committed(path))
    assert 0 < done < ROWS * SAMPLES
    assert not path.exists()
    assert generate(server, path) == 0
    assert files(path) == unbroken
    assert len(committed(path)) == ROWS * SAMPLES


def test_a_generation_listens_on_no_socket(server):
    path = server.folder / "deaf.jsonl"
    assert generate(server, path, at="drawing", number=2, action="say_sockets") == 0
    assert "listening on []" in server.log(path).read_text()


def test_a_full_disk_keeps_what_is_committed(server, unbroken):
    path = server.folder / "full.jsonl"
    assert generate(server, path, file_bytes=900) == 1
    assert "the limit on file size is reached" in server.log(path).read_text()
    assert generate(server, path) == 0
    assert files(path) == unbroken
