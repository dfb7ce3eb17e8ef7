"""Storage: what is written reads back, names cannot leave their folder, and every altered or missing byte is found."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faultfs import without_syncing
from potstill import storage
from potstill.errors import StorageError


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def _commit(folder: Path, **files: bytes) -> Path:
    def write(unfinished):
        for name, data in files.items():
            storage.write_bytes(unfinished / name, data)

    storage.commit_folder(folder, write, facts={"step": 3})
    return folder


def test_what_is_written_reads_back(tmp_path):
    storage.make_folder(tmp_path / "a" / "b")
    storage.write_json(tmp_path / "a" / "b" / "x.json", {"text": "漢 \ud800", "number": 0.1})
    assert json.loads((tmp_path / "a" / "b" / "x.json").read_text()) == {"text": "漢 \ud800", "number": 0.1}
    storage.write_text(tmp_path / "a" / "b" / "x.json", "other")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x.json"]


def test_numbers_that_are_not_json_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_committed_folder_holds_what_its_manifest_says(tmp_path):
    tensors = {"bf16": torch.randn(3, 2).bfloat16(), "scalar": torch.tensor(7), "empty": torch.zeros(0, 4)}

    def write(folder):
        storage.write_tensors(folder / "t.safetensors", tensors)
        (folder / "sub").mkdir()
        (folder / "sub" / "written_by_others.txt").write_text("hello")

    manifest = storage.commit_folder(tmp_path / "final", write, facts={"step": 3})
    assert storage.verify_folder(tmp_path / "final") == []
    assert storage.read_manifest(tmp_path / "final") == manifest
    assert set(manifest.files) == {"t.safetensors", "sub/written_by_others.txt"}
    loaded = storage.read_tensors(tmp_path / "final", "t.safetensors")
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_a_folder_is_not_replaced_unasked_and_a_failing_writer_leaves_nothing(tmp_path):
    _commit(tmp_path / "final", a=b"first")
    with pytest.raises(StorageError, match="exists already"):
        _commit(tmp_path / "final", a=b"second")

    def fail(folder):
        storage.write_bytes(folder / "a", b"half")
        raise RuntimeError("the writer broke")

    with pytest.raises(RuntimeError, match="the writer broke"):
        storage.commit_folder(tmp_path / "final", fail, replace=True)
    assert storage.read_bytes(tmp_path / "final", "a") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path):
    """F7, F8: plain safetensors notices none of the flips in its payload."""
    folder = _commit(tmp_path / "final", a=random.Random(0).randbytes(2000), b=b"{}")
    files = list(folder.iterdir())
    draw = random.Random(1)
    for _ in range(500):
        path = draw.choice(files)
        data = bytearray(path.read_bytes())
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        whole = path.read_bytes()
        path.write_bytes(data)
        problems = storage.verify_folder(folder)
        assert problems, f"bit {bit} of {path.name}"
        assert path.name in problems[0]
        path.write_bytes(whole[: draw.randrange(len(whole))])
        assert storage.verify_folder(folder)
        path.write_bytes(whole)
    assert storage.verify_folder(folder) == []


def test_reading_verifies_what_it_returns(tmp_path):
    folder = _commit(tmp_path / "final", a=b"abcd")
    (folder / "a").write_bytes(b"abce")
    with pytest.raises(StorageError, match="does not read back"):
        storage.read_bytes(folder, "a")
    (folder / "extra").write_bytes(b"unlisted")
    with pytest.raises(StorageError, match="not in the manifest"):
        storage.read_bytes(folder, "extra")
    (folder / "a").unlink()
    assert storage.verify_folder(folder) == ["a: missing"]


def test_the_error_of_a_writer_in_rust_is_explained_too(tmp_path):
    def fail(folder):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageError, match=r"final: .*77 bytes are needed"):
        storage.commit_folder(tmp_path / "final", fail, bytes_needed=77)


HOSTILE = [
    "../outside", "/etc/passwd", "a/../../outside", "..", ".", "", "a//b", "a/b/c", "a\\b", "a\0b", "a b", "a\n", "~", "~/x",
    "$HOME", "%2e%2e", "./a", "a/", "/", "a/.", "a/..", "C:x", "ünicode", "a*", "a?b", "a|b", "a;b", "`id`", "$(id)", "\u202e", "a/../a",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_in_a_manifest_are_refused(name, tmp_path):
    """F34."""
    folder = _commit(tmp_path / "final", a=b"x")
    (tmp_path / "outside").write_text("secret")
    record = storage.read_manifest(folder).files["a"]
    (folder / storage.MANIFEST).write_text(storage.Manifest({name: record}, {}).text())
    with pytest.raises(StorageError):
        storage.read_bytes(folder, name)
    assert storage.verify_folder(folder)


def test_links_are_never_followed(tmp_path):
    folder = _commit(tmp_path / "final", a=b"x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(b"x")  # the same bytes, so that only the link can be at fault
    (folder / "a").unlink()
    (folder / "a").symlink_to(outside / "a")
    assert "a" in storage.verify_folder(folder)[0]
    with pytest.raises(StorageError):
        storage.read_bytes(folder, "a")

    def write(unfinished):
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "a").write_bytes(b"x")

    nested = tmp_path / "nested"
    storage.commit_folder(nested, write)
    (nested / "sub" / "a").unlink()
    (nested / "sub").rmdir()
    (nested / "sub").symlink_to(outside)
    assert storage.verify_folder(nested)

    with pytest.raises(StorageError, match="link"):
        storage.commit_folder(tmp_path / "third", lambda unfinished: (unfinished / "a").symlink_to(outside / "a"))

    storage.remove(nested)
    storage.remove(folder)
    assert (outside / "a").read_bytes() == b"x"


def test_a_fifo_in_place_of_a_file_does_not_hang_the_reader(tmp_path):
    folder = _commit(tmp_path / "final", a=b"x")
    (folder / "a").unlink()
    os.mkfifo(folder / "a")
    assert "not a regular file" in storage.verify_folder(folder)[0]


def test_sweep_removes_orphans_and_puts_back_a_folder_whose_replacement_died(tmp_path):
    _commit(tmp_path / "final", a=b"x")
    (tmp_path / "final").rename(tmp_path / ".old-final")
    (tmp_path / ".tmp-final-1-0").mkdir()
    (tmp_path / ".tmp-file-1-1").write_text("torn")
    (tmp_path / "kept.txt").write_text("not ours")
    assert len(storage.sweep(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "kept.txt"]
    assert storage.verify_folder(tmp_path / "final") == []


def test_a_torn_last_line_is_passed_over_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    assert storage.read_lines(path) == ([], 0)
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert storage.read_lines(path) == ([{"step": 1}, {"step": 2}], 4)
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(StorageError, match=r"log\.jsonl:2"):
        storage.read_lines(path)


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    storage.require_free(tmp_path / "not" / "yet", 1)
    with pytest.raises(StorageError, match="1,000,000,000,000,000 bytes are needed"):
        storage.require_free(tmp_path / "not" / "yet", 10**15)


def test_a_vanished_folder_is_named(tmp_path):
    """F38."""
    folder = tmp_path / "run"
    folder.mkdir()
    storage.probe(folder)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    with pytest.raises(StorageError, match=r"run.*gone"):
        storage.probe(folder)


def test_a_limit_on_file_size_is_a_full_disk(tmp_path):
    """The real errno from the real kernel; nothing is simulated."""
    script = f"""
import resource
from pathlib import Path
from potstill import storage
root = Path({str(tmp_path)!r})
storage.write_bytes(root / "file", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    storage.write_bytes(root / "file", b"x" * 5000)
except storage.StorageError as error:
    print(error)
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "5,000 bytes are needed" in finished.stdout, finished.stderr
    assert str(tmp_path / "file") in finished.stdout
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
