"""YAML that means harm, or is no recipe at all: refused at once, in one line, without running or allocating anything."""

import subprocess
import sys

import pytest

from potstill.errors import ConfigError
from potstill.recipes.text import parse

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
PAYLOADS = {
    "python object": ("student: !!python/object/apply:os.system ['touch /tmp/owned']\n", "a tag"),
    "python name": ("student: !!python/name:os.system\n", "a tag"),
    "python module": ("student: !!python/module:os\n", "a tag"),
    "python tuple": ("student: !!python/tuple [1, 2]\n", "a tag"),
    "local tag": ("student: !include /etc/passwd\n", "a tag"),
    "binary": ("student: !!binary R0lGODlh\n", "a tag"),
    "set": ("student: !!set {a, b}\n", "a tag"),
    "tag on a key": ("!!str student: 1\n", "not a plain word"),
    "billion laughs": (BOMB, "an anchor"),
    "alias alone": ("student: *nothing\n", "an alias"),
    "merge": ("<<: {student: 1}\n", "a merge"),
    "recursive alias": ("&a [*a]\n", "an anchor"),
    "deep flow lists": ("a: " + "[" * 100_000 + "\n", "nested deeper"),
    "deep flow mappings": ("{a: " * 50_000 + "\n", "nested deeper"),
    "deep block": ("".join(" " * i + "a:\n" for i in range(400)), "nested deeper"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(60_000)), "more than 5000 values"),
    "many items": ("a: [" + "1," * 200_000 + "]\n", "more than 5000 values"),
    "too large": ("a: '" + "x" * 2**20 + "'\n", "larger than 1 MiB"),
    "two documents": ("student: 1\n---\nstudent: 2\n", "second document"),
    "directive": ("%TAG ! tag:evil.example,2026:\n---\nstudent: 1\n", "directive"),
    "version": ("%YAML 1.1\n---\nstudent: 1\n", "directive"),
    "complex key": ("? [a, b]\n: 1\n", "not a plain word"),
    "empty key": ("'': 1\n", "not a plain word"),
    "control characters": ("student: \x00\x1b[2J\n", "control characters"),
    "lone surrogate": ("student: \ud800\n", "control characters"),
    "unfinished quote": ("student: 'abc\n", "not YAML"),
    "tab indentation": ("student:\n\tpath: x\n", "not YAML"),
    "unfinished flow": ("student: {path: [\n", "not YAML"),
    "duplicate": ("student: 1\ndata: 2\nstudent: 3\n", "stands twice"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_it_is_refused_with_one_line_that_says_why(name):
    text, said = PAYLOADS[name]
    with pytest.raises(ConfigError) as caught:
        parse(text, "r.yaml")
    message = str(caught.value)
    assert said in message
    assert message.startswith("r.yaml")
    assert "\n" not in message
    assert len(message) < 400


WORKER = """
import resource, sys, time
sys.path.insert(0, {folder!r})
from test_hostile_yaml import PAYLOADS, ConfigError, parse
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, (text, _) in PAYLOADS.items():
    began = time.process_time()
    try:
        parse(text, "r.yaml")
    except ConfigError:
        pass
    spent = time.process_time() - began
    assert spent < 1, (name, spent)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert grown < 100, grown
assert "torch" not in sys.modules
"""


def test_each_is_refused_within_a_second_and_without_memory():
    from pathlib import Path

    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(folder=str(Path(__file__).parent))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["", "# nothing\n", "just text\n", "[1, 2]\n", "5\n"])
def test_what_is_not_a_mapping_is_no_recipe(tmp_path, text):
    from potstill.recipes.read import read_recipe

    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        read_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff\xfe\x00", "not UTF-8"), (b"a: '" + b"x" * 2**20 + b"'", "larger than 1 MiB")]
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, said):
    from potstill.recipes.read import read_recipe

    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_recipe(str(tmp_path / "r.yaml"))


def test_a_byte_order_mark_and_windows_lines_are_no_mistake(tmp_path):
    from potstill.recipes.read import read_recipe

    text = "student: {path: a}\r\ndata: {train: x}\r\ntraining: {steps: 1}\r\nrun: {folder: f}\r\n"
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_recipe(str(tmp_path / "r.yaml")).run.folder == "f"
