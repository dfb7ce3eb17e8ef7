"""The house stands as planned: floors, opening words, sizes, forbidden calls, the map in the README, and what an import costs."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "potstill"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 350


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression that is nothing but names and attributes, else the last attribute alone with a leading dot."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner and not inner.startswith(".") else f".{node.attr}"
    return ""


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_file_opens_with_its_words_and_stays_short(path):
    text = path.read_text(encoding="utf-8")
    words = ast.get_docstring(ast.parse(text))
    assert words, f"{_name(path)} does not say what it does"
    assert text.startswith('"""'), f"{_name(path)}: the words come first"
    assert text.count("\n") <= LONGEST_FILE, f"{_name(path)} has {text.count(chr(10))} lines; is it two files?"


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py" and path.parent.name != "objectives"], ids=_name)
def test_a_room_opens_with_words_alone(path):
    statements = _tree(path).body[1:]
    assert all(isinstance(statement, ast.Assign) for statement in statements), f"{_name(path)} does more than describe its room"


def test_no_file_or_folder_is_named_for_having_no_name():
    refused = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
    assert not [_name(path) for path in FILES if refused & {*path.relative_to(PACKAGE).with_suffix("").parts}]


# ---------------------------------------------------------------- calls that must not stand in the package (F31, F33)

# What executes or unpickles what it reads, and why there is another way.
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "yaml.load", "yaml.load_all",
    "yaml.full_load", "yaml.unsafe_load", "np.load", "numpy.load", "joblib.load", "joblib.dump", "runpy.run_path", "shelve.open",
    "marshal.loads", "marshal.load", "distributed.all_gather_object", "distributed.gather_object", "distributed.broadcast_object_list",
    "torch.distributed.all_gather_object", "torch.distributed.gather_object", "torch.distributed.broadcast_object_list",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _forbidden(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"line {node.lineno}: import {alias.name}" for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module.split(".")[0] in FORBIDDEN_MODULES or FORBIDDEN_CALLS & {*names}:
                yield f"line {node.lineno}: from {node.module} import ..."
        elif isinstance(node, ast.Call):
            if _dotted(node.func) in FORBIDDEN_CALLS:
                yield f"line {node.lineno}: {_dotted(node.func)}()"
            for keyword in node.keywords:
                hazard = (keyword.arg, getattr(keyword.value, "value", None))
                if hazard in {("shell", True), ("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True)}:
                    yield f"line {node.lineno}: {keyword.arg}={hazard[1]}"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_nothing_in_the_package_executes_what_it_reads(path):
    assert list(_forbidden(_tree(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(x)", "from torch import load", "yaml.load(x)", "np.load(x)",
        "eval(x)", "exec(x)", "subprocess.run(x, shell=True)", "load(x, allow_pickle=True)", "from_pretrained(x, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_for_forbidden_calls_finds_them(code):
    assert list(_forbidden(ast.parse(code)))


# ---------------------------------------------------------------- one module writes (F4)

WRITING_CALLS = {
    "os.replace", "os.rename", "os.remove", "os.unlink", "os.truncate", "os.makedirs", "os.mkdir", "shutil.rmtree", "shutil.move",
    "shutil.copy", "shutil.copyfile", "shutil.copytree", "json.dump", "yaml.dump", "save_file", "safetensors.torch.save_file",
}  # fmt: skip
WRITING_METHODS = {"write_text", "write_bytes", "touch", "unlink", "rmdir", "mkdir", "rename", "symlink_to", "to_csv", "to_parquet"}
WRITING_FLAGS = {"os.O_WRONLY", "os.O_RDWR", "os.O_CREAT", "os.O_APPEND", "os.O_TRUNC"}
# A receiver that is Potstill's own writer: the module, or a run folder.
WRITERS = {"storage", "folder", "self.folder", "run_folder", "self"}
ALLOWED_TO_WRITE = {"storage.py", "lock.py", "manifest.py"}


def _writes(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func)
        receiver, _, method = name.rpartition(".")
        modes = [argument.value for argument in [*node.args[:2], *(k.value for k in node.keywords if k.arg == "mode")]
                 if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]  # fmt: skip
        flags = {_dotted(part) for argument in node.args for part in ast.walk(argument)} if name == "os.open" else set()
        opens_to_write = flags & WRITING_FLAGS and "os.devnull" not in flags
        if opens_to_write or name in WRITING_CALLS or (method in WRITING_METHODS and receiver not in WRITERS):
            yield f"line {node.lineno}: {name}()"
        elif (name == "open" or method == "open") and any(re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", mode) for mode in modes):
            yield f"line {node.lineno}: {name}(..., {modes[-1]!r})"


@pytest.mark.parametrize("path", [path for path in FILES if _name(path) not in ALLOWED_TO_WRITE], ids=_name)
def test_only_storage_writes(path):
    assert list(_writes(_tree(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        'open("x", "w")', 'path.open("ab")', "path.write_text(x)", "os.replace(a, b)", 'open(x, mode="r+")',
        "os.open(path, os.O_RDWR | os.O_CREAT)",
    ],
)  # fmt: skip
def test_the_search_for_writes_finds_them(code):
    assert list(_writes(ast.parse(code)))
    assert not list(_writes(ast.parse('open("words.txt")\nstorage.write_text(a, b)\nopen(a, "rb")')))


# ---------------------------------------------------------------- floors


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="import-linter is not installed")
def test_imports_only_point_down():
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr


# ---------------------------------------------------------------- the map in the README


def _map(readme: str) -> set[str]:
    """Paths that the fenced block beginning with `src/potstill/` names, by its indentation; a name ends where two spaces begin."""
    found = re.search(r"^```[^\n]*\nsrc/potstill/[^\n]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert found, "README.md holds no map: a fenced block that begins with src/potstill/"
    paths, folders = set(), []
    for line in found[1].splitlines():
        entry = re.match(r"( *)([A-Za-z0-9_.*/-]+)(?: {2,}\S.*)?$", line)
        if not entry:
            continue  # a line of words
        depth = len(entry[1]) // 2 - 1
        if depth < 0:
            break  # tests/, docs/ and others stand beside src/potstill/
        del folders[depth:]
        paths.add("".join(folders) + entry[2])
        if entry[2].endswith("/"):
            folders.append(entry[2])
    return paths


def _files_and_rooms() -> set[str]:
    files = {_name(path) for path in FILES if path.name not in ("__init__.py", "__main__.py")}
    rooms = {f"{_name(path.parent)}/" for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE}
    return files | rooms


def test_the_map_in_the_readme_equals_the_tree():
    stated = {path for path in _map((ROOT / "README.md").read_text(encoding="utf-8")) if path.endswith((".py", "/"))}
    assert sorted(_files_and_rooms() - stated) == [], "in the tree, not on the map"
    assert sorted(path for path in stated if not (PACKAGE / path).exists()) == [], "on the map, not in the tree"


def test_the_map_is_read_by_indentation():
    lines = ["  batch.py    what flows", "  models/     loading", "    head.py   one", "  cli.py", "tests/   mirrors"]
    readme = "\n".join(["# x", "```text", "src/potstill/", *lines, "```", ""])
    assert _map(readme) == {"batch.py", "models/", "models/head.py", "cli.py"}


# ---------------------------------------------------------------- what an import costs

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "pyarrow", "pandas", "safetensors.torch")


def _imported(statement: str) -> tuple[set[str], float]:
    """Heavy modules that `statement` imports, and the seconds of processor time that the interpreter took."""
    script = f"import sys, time\n{statement}\nprint([name for name in {HEAVY!r} if name in sys.modules], time.process_time())"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    names, _, seconds = finished.stdout.strip().splitlines()[-1].rpartition(" ")
    return set(ast.literal_eval(names)), float(seconds)


LIGHT = [
    "import potstill", "import potstill.run_folder", "import potstill.errors", "import potstill.lock",
    *(f"import potstill.{path.parent.name}.config" for path in FILES if path.name == "config.py" and path.parent != PACKAGE),
    *(f"import potstill.recipes.{name}" for name in ("schema", "read") if (PACKAGE / "recipes" / f"{name}.py").exists()),
]  # fmt: skip


@pytest.mark.parametrize("statement", LIGHT)
def test_reading_a_recipe_imports_nothing_heavy(statement):
    heavy, seconds = _imported(statement)
    assert heavy == set()
    assert seconds < 1.0


@pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="no command line yet")
def test_help_imports_nothing_heavy_and_takes_under_a_second():
    statement = "sys.argv = ['potstill', '--help']\ntry:\n    from potstill.cli import main; main()\nexcept SystemExit:\n    pass"
    heavy, seconds = _imported(statement)
    assert heavy == set()
    assert seconds < 1.0
