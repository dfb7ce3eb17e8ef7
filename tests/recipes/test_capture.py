"""From a teacher to its recorded answers to a student, through the command line: cached equals live, and what does not fit is refused."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from potstill.cache.store import CacheReader
from potstill.recipes.read import read_recipe
from potstill.run_folder import RunFolder
from small_recipe import LORA, potstill
from tiny import CHATML, save_pair


@pytest.fixture(scope="module")
def cache(place) -> Path:
    """A cache of the place's teacher, 16 outcomes a target."""
    assert potstill("capture", place / "r.yaml", "--quiet", f"capture={{path: {place}/cache, k: 16}}") == 0
    return place / "cache"


def distill(place: Path, run: str, *arguments: str) -> int:
    return potstill("distill", place / "r.yaml", "--quiet", f"run.folder={place}/{run}", *arguments)


def from_cache(path: object) -> str:
    return f"teacher={{kind: cache, path: {path}}}"


def weights(place: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(place / run / "student" / "model.safetensors")


# ---------------------------------------------------------------- the whole path


def test_a_student_learns_from_the_cache_without_its_teacher(place, cache, capsys):
    (place / "teacher").rename(place / "gone")
    try:
        assert distill(place, "offline", from_cache(cache)) == 0
    finally:
        (place / "gone").rename(place / "teacher")
    said = capsys.readouterr()
    assert "objective.support=top_k_tail, objective.top_k=16" in said.err
    recorded = RunFolder.read(place / "offline").read_recipe()
    assert (recorded["objective"]["support"], recorded["objective"]["top_k"]) == ("top_k_tail", 16)
    assert RunFolder.read(place / "offline").read_summary()["steps"] == 4


@pytest.mark.parametrize("outcomes", ["outcomes: hidden", "k: 320"])
def test_what_is_learned_from_an_exact_cache_is_what_is_learned_live(place, outcomes):
    name = outcomes.split(": ")[1]
    assert potstill("capture", place / "r.yaml", "--quiet", f"capture={{path: {place}/exact-{name}, {outcomes}}}") == 0
    if not (place / "live").exists():
        assert distill(place, "live") == 0
    assert distill(place, f"from-{name}", from_cache(place / f"exact-{name}")) == 0
    live, cached = weights(place, "live"), weights(place, f"from-{name}")
    for parameter, tensor in live.items():
        torch.testing.assert_close(cached[parameter], tensor, rtol=0, atol=1e-5)
    ours, theirs = (
        [line["loss"] for line in RunFolder.read(place / run).read_metrics() if "loss" in line] for run in ("live", f"from-{name}")
    )
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_answers_on_the_students_own_head_are_exact_for_forward_kl(place):
    assert potstill("capture", place / "r.yaml", "--quiet", LORA, f"capture={{path: {place}/projected, outcomes: projected}}") == 0
    assert distill(place, "live-lora", LORA) == 0
    assert distill(place, "from-projected", LORA, from_cache(place / "projected")) == 0
    live, cached = weights(place, "live-lora"), weights(place, "from-projected")
    for parameter, tensor in live.items():
        torch.testing.assert_close(cached[parameter], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "without student.lora every weight learns; add student.lora"),
        (["student.lora={rank: 2, alpha: 4, targets: [q_proj, lm_head]}"], "student.lora trains the head; add student.lora"),
        ([LORA, "student.path=PLACE/teacher"], "the record's projections are"),
    ],
)
def test_answers_on_another_head_are_refused_before_the_run_begins(place, capsys, arguments, said):
    assert potstill("capture", place / "r.yaml", "--quiet", LORA, f"capture={{path: {place}/projected, outcomes: projected}}") == 0
    capsys.readouterr()
    changed = [argument.replace("PLACE", str(place)) for argument in arguments]
    assert distill(place, "refused", from_cache(place / "projected"), *changed) == 2
    assert said in capsys.readouterr().err
    assert not (place / "refused" / "recipe.yaml").exists()


def test_a_capture_says_the_command_that_trains_from_it(place, capsys):
    changed = ["data.max_tokens=48", f"run.folder={place}/said run", f"capture={{path: '{place}/of 48', k: 4, temperature: 2.0}}"]
    assert potstill("capture", place / "r.yaml", "--quiet", *changed) == 0
    words = shlex.split(capsys.readouterr().out.split("train from it: ")[1])
    assert words[0] == "potstill"
    assert potstill(*words[1:], "--quiet", "training.steps=1") == 0
    assert (place / "said run" / "student").is_dir()


def test_a_cache_is_compared_with_the_recipe_as_it_was_captured(place, capsys):
    short = "data.max_tokens=40"
    assert potstill("capture", place / "r.yaml", "--quiet", short, f"capture={{path: {place}/of40, k: 4}}") == 0
    assert potstill("cache", "verify", place / "of40", "--recipe", place / "r.yaml", short) == 0
    assert potstill("cache", "inspect", place / "of40", "--teacher", place / "r.yaml", short) == 0
    assert "lost by coding" in capsys.readouterr().out
    assert potstill("cache", "inspect", place / "of40", "--teacher", place / "r.yaml") == 2
    assert "truncation.max_tokens" in capsys.readouterr().err
    assert potstill("cache", "verify", place / "of40", short) == 2
    assert "add --recipe RECIPE" in capsys.readouterr().err


def test_random_samples_are_learned_from_by_their_own_support(place, capsys):
    section = f"capture={{path: {place}/drawn, outcomes: sampled, num_samples: 20}}"
    assert potstill("capture", place / "r.yaml", "--quiet", section) == 0
    assert distill(place, "from-drawn", from_cache(place / "drawn"), "training.steps=1") == 0
    assert "objective.support=samples, objective.num_samples=20" in capsys.readouterr().err
    assert distill(place, "never", from_cache(place / "drawn"), "objective.divergence=jsd") == 2
    assert "gives sampled outcomes" in capsys.readouterr().err


def test_what_is_captured_is_asked_once_and_another_teacher_is_refused(place, cache, capsys):
    section = f"capture={{path: {cache}, k: 16}}"
    assert potstill("capture", place / "r.yaml", "--quiet", section) == 0
    assert "every sequence is committed already (36); nothing was asked" in capsys.readouterr().out
    other = save_pair(place / "other-teacher", 5, width=64)
    assert potstill("capture", place / "r.yaml", "--quiet", section, f"teacher.path={other}") == 2
    assert "teacher weights" in capsys.readouterr().err
    assert potstill("capture", place / "r.yaml", "--quiet", f"capture={{path: {cache}, k: 8}}") == 2
    assert "k: 8" in capsys.readouterr().err
    assert len(CacheReader(str(cache))) == 36


# ---------------------------------------------------------------- what a cache must have been made from (F21)


def _other_weights(place: Path) -> list[str]:
    other = shutil.copytree(place / "teacher", place / "teacher-one-bit")
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    return [f"teacher.model={{path: {other}}}"]


def _other_tokenizer(place: Path) -> list[str]:
    other = shutil.copytree(place / "student", place / "student-other-tokens")
    spec = json.loads((other / "tokenizer.json").read_text())
    first, second = [token for token in spec["model"]["vocab"] if token.isalpha()][:2]
    vocabulary = spec["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    return [f"student.path={other}"]


def _other_template(place: Path) -> list[str]:
    (place / "other.jinja").write_text(CHATML + " ")
    return [f"data.chat_template={place}/other.jinja"]


def _other_row(place: Path) -> list[str]:
    lines = (place / "rows.jsonl").read_text().splitlines()
    (place / "other.jsonl").write_text("\n".join([lines[0].replace("Add", "add"), *lines[1:]]) + "\n")
    return [f"data.train={place}/other.jsonl"]


CHANGES = {
    "teacher weights": (_other_weights, "teacher weights"),
    "tokenizer": (_other_tokenizer, "tokenizer"),
    "template": (_other_template, "template"),
    "truncation": (lambda place: ["data.max_tokens=95"], "truncation.max_tokens"),
    "data row": (_other_row, "other.jsonl:1"),
    "k": (lambda place: ["objective.support=top_k_tail", "objective.top_k=17"], "objective.top_k: 17 asked"),
    "temperature": (lambda place: ["objective.temperature=2.0"], "objective.temperature: 2 asked"),
    "support": (lambda place: ["objective.support=full"], "full asks for more"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_of_something_else_is_refused_by_name_before_a_weight_is_read(place, cache, change, capsys, monkeypatch):
    for room in ("assemble", "teachers"):
        monkeypatch.setattr(f"potstill.recipes.{room}.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    make, said = CHANGES[change]
    overrides = make(place)
    for command in ("distill", "check"):
        arguments = [from_cache(cache), *overrides, f"run.folder={place}/never"]
        assert potstill(command, place / "r.yaml", *arguments) == 2
        assert said in capsys.readouterr().err
    assert not (place / "never").exists()


def test_another_path_of_the_same_is_accepted(place, cache, capsys):
    shutil.copytree(cache, place / "moved-cache")
    shutil.copytree(place / "teacher", place / "moved-teacher")
    shutil.copytree(place / "student", place / "moved-student")
    shutil.copy(place / "rows.jsonl", place / "moved.jsonl")
    arguments = [
        f"teacher={{kind: cache, path: 'file://{place}/moved-cache', model: {{path: {place}/moved-teacher}}}}",
        f"student.path={place}/moved-student", f"data.train={place}/moved.jsonl",
    ]  # fmt: skip
    assert distill(place, "moved", *arguments, "training.steps=1") == 0
    # And the run goes on when its cache has moved again.
    assert distill(place, "moved", f"teacher={{kind: cache, path: {cache}}}", *arguments[1:], "training.steps=2",
                   "--override-resume", "student.path", "--override-resume", "data.train") == 0  # fmt: skip
    assert "recorded answers may be moved" in capsys.readouterr().err


def test_a_run_that_goes_on_from_another_cache_is_refused(place, cache, capsys):
    assert distill(place, "two-caches", from_cache(cache), "training.steps=1") == 0
    assert potstill("capture", place / "r.yaml", "--quiet", f"capture={{path: {place}/other-cache, k: 16}}",
                    f"teacher.path={save_pair(place / 'third-teacher', 7, width=64)}") == 0  # fmt: skip
    assert distill(place, "two-caches", from_cache(place / "other-cache"), "training.steps=2") == 2
    assert "this run began with another teacher cache" in capsys.readouterr().err


# ---------------------------------------------------------------- shards, and the commands of caches


def test_shards_are_put_together_and_verified_against_the_recipe(place, cache, capsys):
    for index in (1, 2):
        arguments = [f"capture={{path: {place}/shard-{index}, k: 16}}", "--shard", f"{index}/2"]
        assert potstill("capture", place / "r.yaml", "--quiet", *arguments) == 0
    assert potstill("cache", "verify", place / "shard-1", "--recipe", place / "r.yaml") == 1
    said = capsys.readouterr().out
    assert f"{place}/rows.jsonl:" in said
    assert "missing" in said
    assert potstill("cache", "merge", place / "whole", place / "shard-1", place / "shard-2") == 0
    assert potstill("cache", "verify", place / "whole", "--recipe", place / "r.yaml") == 0
    assert sorted(CacheReader(str(place / "whole")).keys()) == sorted(CacheReader(str(cache)).keys())
    assert distill(place, "from-shards", from_cache(place / "whole")) == 0
    if not (place / "offline").exists():
        assert distill(place, "offline", from_cache(cache)) == 0
    for name, tensor in weights(place, "offline").items():
        torch.testing.assert_close(weights(place, "from-shards")[name], tensor, rtol=0, atol=1e-6)


def test_inspect_says_what_a_cache_holds_and_what_its_records_lose(place, cache, capsys):
    assert potstill("cache", "inspect", cache, "--teacher", place / "r.yaml") == 0
    said = capsys.readouterr().out
    for part in ("top_k, k = 16", "36 sequences", "bytes a token", "mass of the kept ids", "teacher weights", "tokenizer"):
        assert part in said, part
    lost = float(said.split("lost by coding")[1].split()[0])
    assert 0 <= lost < 1e-4  # 16 nearly equal outcomes are the worst case for the codec


def test_check_shows_the_cache_and_how_much_of_the_text_it_covers(place, cache, capsys):
    assert potstill("check", place / "r.yaml", from_cache(cache)) == 0
    said = capsys.readouterr().out
    for part in ("recorded answers in", "the teacher's 16 most likely tokens", "Recorded answers", "36 examples of this run, all of them"):
        assert part in said, part
    assert "teacher memory" not in said


@pytest.mark.parametrize("outcomes", ["top_k, k: 16", "sampled", "hidden"])
def test_check_predicts_what_a_capture_writes(place, capsys, outcomes):
    assert potstill("check", place / "r.yaml", f"capture={{path: {place}/predicted, outcomes: {outcomes}}}") == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (f"Capture written to {place}/predicted", "36 sequences of 1,146 tokens, 342 target tokens", "at most about"):
        assert part in said.replace("predict ed", "predicted"), part
    assert not (place / "predicted").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["capture", "r.yaml"], "capture: missing; say where the answers go"),
        (["capture", "r.yaml", "capture={path: c}", "teacher={kind: cache, path: cache}"], "a cache holds answers already"),
        (["capture", "r.yaml", "capture={path: c}", "--shard", "3/2"], "--shard 3/2"),
        (["capture", "r.yaml", "capture={path: c}", "--engine", "spark"], "--engine spark"),
        (["capture", "r.yaml", "capture={path: c}", "objective.kd_ratio=0"], "the teacher is never asked"),
        (["distill", "r.yaml", "teacher={kind: cache, path: nowhere}"], "teacher.path: nowhere: no such folder"),
        (["distill", "r.yaml", "teacher={kind: cache, path: student}"], "teacher.path: student: no cache there (cache.json is missing)"),
        (
            ["check", "r.yaml", "teacher={kind: ensemble, teachers: {one: {kind: cache, path: cache}, two: {path: teacher}}}"],
            "teacher.teachers.one: a mean needs whole distributions, and the cache",
        ),
        (["evaluate", "student", "--data", "rows.jsonl", "--teacher", "cache"], "this is a cache of recorded answers"),
        (["cache", "inspect", "nowhere"], "no cache of answers lies here"),
        (["cache", "verify", "student"], "no cache of answers lies here"),
    ],
)
def test_what_cannot_be_captured_or_read_is_one_line_and_exit_code_2(place, cache, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(place)
    assert potstill(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (place / "c").exists()


# ---------------------------------------------------------------- several teachers, secrets


@pytest.mark.parametrize("how", ["mean", "column"])
def test_several_teachers_teach_and_are_captured_as_one(place, how, capsys):
    second = place / "second-teacher"
    if not second.exists():
        save_pair(second, 9)
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    routed = [row | {"who": "one" if number % 3 else "two"} for number, row in enumerate(rows)]
    (place / "routed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in routed))
    column = ", column: who" if how == "column" else ", weights: {one: 3, two: 1}"
    both = f"teacher={{kind: ensemble, teachers: {{one: {{path: {place}/teacher}}, two: {{path: {second}}}}}{column}}}"
    arguments = [f"data.train={place}/routed.jsonl"]
    assert distill(place, f"{how}-live", both, *arguments) == 0
    section = f"capture={{path: {place}/{how}-cache, k: 320}}"
    assert potstill("capture", place / "r.yaml", "--quiet", both, section, *arguments) == 0
    assert distill(place, f"{how}-cached", from_cache(place / f"{how}-cache"), *arguments) == 0
    live, cached = weights(place, f"{how}-live"), weights(place, f"{how}-cached")
    for name, tensor in live.items():
        torch.testing.assert_close(cached[name], tensor, rtol=0, atol=1e-5)
    assert potstill("check", place / "r.yaml", both, *arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("one 0.75, two 0.25" if how == "mean" else "its column 'who' names") in said


CANARY = "hf_canaryCANARYcanaryCANARYcanary12"


def test_a_secret_is_in_no_output_and_in_no_cache(place, cache, capsys, monkeypatch):
    for name in ("HF_TOKEN", "SERVER_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    section = f"capture={{path: {place}/canary-cache, k: 4}}"
    assert potstill("capture", place / "r.yaml", section) == 0
    assert potstill("capture", place / "r.yaml", section, f"teacher.path=https://me:{CANARY}@example.org/model") == 2
    assert potstill("capture", place / "r.yaml", f"capture={{path: 's3://me:{CANARY}@bucket/x', k: 4}}") != 0
    server = "teacher={kind: server, url: 'http://127.0.0.1:9', model: m, api_key_env: SERVER_API_KEY, max_outage_seconds: 0}"
    assert potstill("check", place / "r.yaml", server) == 2
    for command in ("inspect", "verify"):
        assert potstill("cache", command, place / "canary-cache") == 0
        assert potstill("cache", command, f"https://me:{CANARY}@example.org/cache") != 0
    assert potstill("cache", "merge", place / "canary-merged", place / "canary-cache") == 0
    shown = capsys.readouterr()
    assert CANARY not in shown.out + shown.err
    written = [path for folder in ("canary-cache", "canary-merged") for path in (place / folder).rglob("*") if path.is_file()]
    assert len(written) >= 6
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


def test_the_section_of_the_small_recipe_stays_out_of_the_way(place):
    assert read_recipe(str(place / "r.yaml")).capture is None
