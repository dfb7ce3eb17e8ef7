"""A place holds whole objects under plain names, in a folder and behind fsspec; errors name the place and no secret of its URL."""

import errno
import os
import threading

import fsspec
import pytest

from potstill.errors import RunFolderError, StorageError
from potstill.place import Folder, ObjectStore, place_at


@pytest.fixture(params=["folder", "memory", "disk behind fsspec"])
def place(request, tmp_path):
    if request.param != "memory":
        path = str(tmp_path / "deep" / "place")
        yield place_at(path) if request.param == "folder" else ObjectStore(f"file://{path}")
        return
    yield place_at(f"memory://{tmp_path.name}/deep/place/")
    fsspec.filesystem("memory").store.clear()


def test_objects_are_put_whole_listed_read_by_range_and_deleted(place):
    assert place.sizes() == {}
    place.prepare()
    place.prepare()
    assert place.sizes() == {}
    place.put("a", b"0123456789")
    place.put("b.x-1_", memoryview(b"abc"))
    place.put("a", b"9876543210")
    assert place.sizes() == {"a": 10, "b.x-1_": 3}
    assert place.read("a") == b"9876543210"
    assert place.read_ranges([("a", 2, 5), ("b.x-1_", 0, 3), ("a", 0, 1), ("a", 3, 3)]) == [b"765", b"abc", b"9", b""]
    assert place.read_ranges([("a", 8, 12)]) == [b"10"]
    assert place.read_ranges([]) == []
    place.delete(["a", "never-there"])
    assert place.sizes() == {"b.x-1_": 3}
    assert place.unfinished() == {}


def test_what_is_not_there_is_said_with_its_errno(place):
    place.prepare()
    for ask in (lambda: place.read("absent"), lambda: place.read_ranges([("absent", 0, 1)])):
        with pytest.raises(StorageError, match="absent") as raised:
            ask()
        assert raised.value.errno == errno.ENOENT


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "..", "a\0", "a b"])
def test_names_stay_inside(place, name):
    place.prepare()
    for ask in (
        lambda: place.read(name), lambda: place.read_ranges([(name, 0, 1)]), lambda: place.put(name, b"x"), lambda: place.delete([name]),
    ):  # fmt: skip
        with pytest.raises(StorageError, match="not a name"):
            ask()


def test_a_url_is_an_object_store_and_a_path_a_folder(tmp_path):
    assert isinstance(place_at("memory://x"), ObjectStore)
    assert isinstance(place_at(f"file://{tmp_path}"), Folder)
    assert isinstance(place_at(f"local://{tmp_path}"), Folder)
    assert isinstance(place_at("a/b:c"), Folder)
    with pytest.raises(StorageError, match="nonsense://x"):
        place_at("nonsense://x")


def test_no_secret_of_a_url_is_in_a_message(monkeypatch):
    monkeypatch.setenv("STORE_API_KEY", "canary-0123456789")
    with pytest.raises(StorageError) as raised:
        place_at("nonsense://user:canary@host/canary-0123456789/x")
    assert "canary" not in str(raised.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        place_at(str(tmp_path / "file" / "place")).prepare()
    place = place_at(str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="gone"):
        place.put("a", b"x")


def test_a_lock_keeps_others_out_until_it_is_given_back(tmp_path):
    place = place_at(str(tmp_path))
    with place.lock(".lock-x", held="x is taken", remedy="or stop it"):
        with pytest.raises(RunFolderError, match=r"x is taken .*or stop it"), place.lock(".lock-x", held="x is taken", remedy="or stop it"):
            pass
        with place.lock(".lock-y", held="", remedy=""):
            pass
    with place.lock(".lock-x", held="", remedy=""):
        pass


def test_threads_may_read_while_open_files_are_put_out_of_the_list(tmp_path):
    place = place_at(str(tmp_path))
    for number in range(300):
        (tmp_path / f"f{number}").write_bytes(str(number).encode() * 100)
    errors = []

    def read(seed):
        for number in range(seed, seed + 600):
            name = str(number * 7 % 300)
            if place.read_ranges([(f"f{name}", 0, 5 * len(name))]) != [name.encode() * 5]:
                errors.append(name)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(os.listdir("/proc/self/fd")) < 250
