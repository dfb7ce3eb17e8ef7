"""Recipes are read strictly: every mutated key of every library recipe is refused by name; good ones mean what they say."""

import json
import re

import pytest

from potstill.errors import ConfigError
from potstill.models.config import LoraConfig
from potstill.objectives import catalogue
from potstill.recipe_changes import recipe_changes
from potstill.recipes.mistakes import _models
from potstill.recipes.read import library, read_recipe, recipe_from_values
from potstill.recipes.schema import PARAMETER_KEYS, ObjectiveConfig, Recipe
from potstill.recipes.text import parse, read_scalar

MINIMAL = {"student": {"path": "a/b"}, "data": {"train": "x.jsonl"}, "training": {"steps": 1}, "run": {"folder": "runs/x"}}
WITH_TEACHER = MINIMAL | {"teacher": {"path": "c/d"}}
LIBRARY = {name: parse(text, name).values for name, text in library().items()}


def refusal(values) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe_from_values(values)
    return str(caught.value)


def read_text(tmp_path, text: str, *overrides: str) -> Recipe:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    return read_recipe(str(tmp_path / "r.yaml"), overrides)


def paths(values, prefix=()):
    """Every key of nested mappings."""
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


METHODS = ("gkd", "minillm", "distillm", "distillm2", "on-policy-policy-gradient", "self-distill", "seqkd")
KEYS = [(name, path) for name, values in LIBRARY.items() if not name.startswith("small-") for path in paths(values)]


def changed(name: str, path: tuple[str, ...]):
    """A copy of the recipe and the mapping that holds the key."""
    values = json.loads(json.dumps(LIBRARY[name]))
    holder = values
    for part in path[:-1]:
        holder = holder[part]
    return values, holder


# ---------------------------------------------------------------- the library


def test_the_library_holds_the_published_runs_and_their_twins():
    assert set(library()) == {
        "llama3.1-8b-teacher-lora",
        "llama3.2-1b-from-8b",
        "llama3.2-1b-sft",
        "qwen2-1.5b-teacher-lora",
        "qwen2-0.5b-from-1.5b",
        "qwen2-0.5b-sft",
        "qwen1.5-14b-from-32b-awq",
        "qwen1.5-14b-from-32b-awq-and-text",
        "qwen1.5-14b-sft",
        "qwen2-7b-top100-capture",
        "qwen2-0.5b-from-top100",
        "qwen2-0.5b-top100-sft",
        *METHODS,
        *(f"small-{name}" for name in METHODS),
    }


@pytest.mark.parametrize("name", LIBRARY)
def test_every_library_recipe_is_read_and_explains_itself(name):
    recipe = read_recipe(name)
    assert recipe.data.train == ("runs/quickstart/data/transfer.jsonl" if name.startswith("small-") else "yahma/alpaca-cleaned")
    assert library()[name].startswith("# ")
    assert recipe_from_values(recipe.resolved()).resolved() == recipe_from_values(LIBRARY[name]).resolved()


@pytest.mark.parametrize("name", METHODS)
def test_a_small_recipe_is_the_method_on_other_models(name):
    large, small = read_recipe(name), read_recipe(f"small-{name}")
    assert small.objective == large.objective
    if small.rollouts is not None:
        assert (small.rollouts.author, small.rollouts.others) == (large.rollouts.author, large.rollouts.others)
        assert small.rollouts.sampling.model_copy(update={"max_new_tokens": 256}) == large.rollouts.sampling
    assert (small.data.teacher_prompt, small.generate is None) == (large.data.teacher_prompt, large.generate is None)


def test_the_llama_student_is_as_published():
    recipe = read_recipe("llama3.2-1b-from-8b")
    assert (recipe.student.lora.rank, recipe.student.lora.alpha) == (64, 128)
    assert set(recipe.student.lora.targets) == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    training, objective = recipe.training, recipe.objective
    assert (training.batch_size, training.accumulation, training.learning_rate, training.warmup_steps) == (4, 32, 3e-4, 100)
    assert (training.scheduler, training.epochs, training.weight_decay, training.max_grad_norm) == ("cosine", 1, 0.01, None)
    assert (objective.divergence, objective.kd_ratio, objective.temperature) == ("forward_kl", 0.5, 1.0)


@pytest.mark.parametrize(
    ("student", "twin"),
    [
        ("llama3.2-1b-from-8b", "llama3.2-1b-sft"),
        ("qwen2-0.5b-from-1.5b", "qwen2-0.5b-sft"),
        ("qwen1.5-14b-from-32b-awq", "qwen1.5-14b-sft"),
        ("qwen1.5-14b-from-32b-awq-and-text", "qwen1.5-14b-sft"),
        ("qwen2-0.5b-from-top100", "qwen2-0.5b-top100-sft"),
    ],
)
def test_a_twin_differs_by_the_teacher_alone(student, twin):
    taught, alone = read_recipe(student), read_recipe(twin)
    assert alone.teacher is None
    assert not alone.objective.asks_teacher
    assert (taught.student, taught.data, taught.training) == (alone.student, alone.data, alone.training)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("llama3.2-1b-from-8b", "llama3.1-8b-teacher-lora"), ("qwen2-0.5b-from-1.5b", "qwen2-1.5b-teacher-lora")],
)
def test_the_teacher_of_a_student_is_what_its_own_recipe_trains(student, teacher):
    taught, trained = read_recipe(student).teacher, read_recipe(teacher)
    assert taught.path == trained.student.path
    assert taught.adapter == f"{trained.run.folder}/adapter"
    assert (trained.student.lora.rank, trained.student.lora.alpha) == (8, 16)


def test_the_quantised_teacher_teaches_alone_and_beside_the_text():
    alone, both = read_recipe("qwen1.5-14b-from-32b-awq"), read_recipe("qwen1.5-14b-from-32b-awq-and-text")
    assert (alone.teacher, alone.student, alone.data, alone.training) == (both.teacher, both.student, both.data, both.training)
    assert (alone.objective.weights, both.objective.weights) == ((1.0, 0.0), (0.5, 0.5))
    assert (alone.student.quantization, alone.data.max_tokens, alone.teacher.path) == ("4bit", 1024, "Qwen/Qwen1.5-32B-Chat-AWQ")


def test_the_offline_student_learns_from_what_the_capture_recipe_records():
    recorded, taught = read_recipe("qwen2-7b-top100-capture"), read_recipe("qwen2-0.5b-from-top100")
    assert recorded.capture.path == taught.teacher.path
    assert (recorded.student, recorded.data, recorded.objective) == (taught.student, taught.data, taught.objective)
    assert (recorded.capture.outcomes, recorded.capture.k) == ("top_k", 100)
    assert (taught.objective.support, taught.objective.weights) == ("top_k_renormalised", (1.0, 0.4))
    assert (taught.training.global_batch, taught.training.learning_rate, taught.training.weight_decay) == (128, 1e-5, 0.01)


# ---------------------------------------------------------------- mutations


@pytest.mark.parametrize(("name", "path"), KEYS, ids=lambda value: value if isinstance(value, str) else ".".join(value))
def test_a_mutated_key_is_refused_by_name(name, path):
    key = path[-1]
    for place in range(len(key)):
        typo = key[:place] + key[place + 1 :]
        values, holder = changed(name, path)
        if not typo or typo in holder:
            continue
        holder[typo] = holder.pop(key)
        message = refusal(values)
        assert f"{'.'.join((*path[:-1], typo))}: unknown key" in message
        assert len(key) < 5 or f"did you mean {key}?" in message  # of short names another sibling may be as near


@pytest.mark.parametrize(("name", "path"), KEYS, ids=lambda value: value if isinstance(value, str) else ".".join(value))
def test_a_key_in_the_wrong_section_is_refused(name, path):
    lora = {"lora"} if "lora" in LIBRARY[name]["student"] else set()
    for section in (set(LIBRARY[name]) | lora) - {path[0], *path[-2:]}:
        values, holder = changed(name, path)
        target = values["student"]["lora"] if section == "lora" else values[section]
        if path[-1] in target or path[0] == path[-1]:
            continue
        value = holder.pop(path[-1])
        target[path[-1]] = value
        models = [LoraConfig] if section == "lora" else _models(Recipe.model_fields[section].annotation)
        fields = next(model for model in models if len(models) == 1 or target["kind"] in str(model.model_fields["kind"])).model_fields
        if path[-1] not in fields:  # else the other section has a key of this name too, such as path or seed
            assert f".{path[-1]}: unknown key" in refusal(values)


@pytest.mark.parametrize(("name", "path"), KEYS, ids=lambda value: value if isinstance(value, str) else ".".join(value))
def test_a_wrong_type_is_refused_by_name(name, path):
    value = changed(name, path)[1][path[-1]]
    wrong = {
        dict: [5, "text", [1]],
        list: [7, {"a": 1}],
        str: [[1], {"a": 1}, True],
        bool: ["yes", 2, []],
        int: ["x", "4", 1.5, True, []],
        float: ["x", "1e-4", True, []],
        type(None): [["x"], {"a": 1}],
    }[type(value)]
    for other in wrong:
        values, holder = changed(name, path)
        holder[path[-1]] = other
        if (other == 1.5 and path[-1] in ("alpha", "epochs")) or (isinstance(other, str) and path[-1] == "validation"):
            continue  # a number that happens to be whole; a fraction that may be a file too
        assert re.search(rf"{'.'.join(path)}(\[0\])?: ", refusal(values)), other


@pytest.mark.parametrize("name", LIBRARY)
def test_a_duplicate_key_is_refused_with_both_lines(name, tmp_path):
    lines = library()[name].splitlines()
    top = [i for i, line in enumerate(lines) if line and line[0] not in " #"]
    inner = [i for i, line in enumerate(lines) if line.startswith("  ") and ":" in line]
    for number in [*inner, *(i for i in top if "{" in lines[i])]:
        text = "\n".join([*lines[: number + 1], lines[number], *lines[number + 1 :]])
        key = lines[number].split(":")[0].strip()
        with pytest.raises(ConfigError, match=rf"r.yaml:{number + 2}: .*{key} stands twice, first at .*r.yaml:{number + 1}"):
            read_text(tmp_path, text)


@pytest.mark.parametrize(
    "path", [("student",), ("student", "path"), ("data",), ("data", "train"), ("training",), ("run",), ("run", "folder")]
)
def test_what_has_no_default_must_be_there(path):
    values, holder = changed("llama3.2-1b-from-8b", path)
    del holder[path[-1]]
    assert f"{'.'.join(path)}: missing" in refusal(values)


def test_all_mistakes_are_said_at_once_each_with_its_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_text(
            tmp_path,
            "student: {path: a}\ndata:\n  train: x\n  packng: true\ntraining: {steps: 1, learning_rate: fast}\nrun: {seed: -1}\n",
        )
    lines = str(caught.value).splitlines()
    assert [line.split("r.yaml")[1].split(";")[0] for line in lines] == [
        ":4: data.packng: unknown key",
        ":5: training.learning_rate: must be a number",
        ":6: run.folder: missing",
        ":6: run.seed: must be at least 0",
    ]
    assert "did you mean packing?" in lines[0]


# ---------------------------------------------------------------- scalars and overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3.0e-4", 3e-4),
        ("5", 5),
        ("-3", -3),
        (".5", 0.5),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0x1F", "0x1F"),
        (".nan", ".nan"),
        (".inf", ".inf"),
        ("1e999", "1e999"),
        ("2026-11-21", "2026-11-21"),
        ("~", None),
        ("null", None),
        ("", None),
        ("true", True),
        ("False", False),
        ("1.2.3", "1.2.3"),
    ],
)
def test_a_scalar_is_what_it_looks_like(text, value):
    assert read_scalar(text) == value
    assert type(read_scalar(text)) is type(value)


def test_a_number_where_text_is_wanted_is_the_text_as_written(tmp_path):
    recipe = read_text(tmp_path, "student: {path: 010}\ndata: {train: 1e3}\ntraining: {steps: 1}\nrun: {folder: 2024.10}\n")
    assert (recipe.student.path, recipe.data.train, recipe.run.folder) == ("010", "1e3", "2024.10")


def test_overrides_win_and_are_checked_like_the_file(tmp_path):
    text = "student: {path: a}\ndata: {train: x}\ntraining: {steps: 1}\nrun: {folder: f}\n"
    overrides = [
        "training.learning_rate=1e-3",
        "student.lora.rank=4",
        "student.lora.targets=[q_proj, v_proj]",
        "teacher={path: t}",
        "run.folder=a: b #c",
    ]
    recipe = read_text(tmp_path, text, *overrides)
    assert recipe.training.learning_rate == 1e-3
    assert (recipe.student.lora.rank, recipe.student.lora.targets) == (4, ["q_proj", "v_proj"])
    assert (recipe.teacher.path, recipe.run.folder) == ("t", "a: b #c")
    assert read_text(tmp_path, text, "teacher={path: t}", "teacher=null").teacher is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.stps=3", "training.stps: unknown key; did you mean steps?"),
        ("trainin.steps=3", "trainin: unknown key; did you mean training?"),
        ("training.steps=x", "training.steps: must be a whole number"),
        ("training.steps", "section.key=value"),
        ("=3", "section.key=value"),
        ("training.steps.more=3", "training.steps is 1 and holds no keys"),
        ("data.train=[", "not YAML"),
        ("data.train=!!python/name:os.system [1]", None),
        ("data.train=['a', &b c]", "an anchor"),
    ],
)
def test_a_bad_override_is_refused(tmp_path, override, said):
    text = "student: {path: a}\ndata: {train: x}\ntraining: {steps: 1}\nrun: {folder: f}\n"
    if said is None:  # unquoted text is text, whatever it looks like
        assert read_text(tmp_path, text, override).data.train == override.split("=", 1)[1]
        return
    with pytest.raises(ConfigError, match=r"command line|section\.key"):
        read_text(tmp_path, text, override)
    with pytest.raises(ConfigError) as caught:
        read_text(tmp_path, text, override)
    assert said in str(caught.value)


def test_nothing_is_ever_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_PLACE", "expanded")
    with pytest.raises(ConfigError, match=r"run.folder: .*is not expanded") as caught:
        read_text(tmp_path, "student: {path: a}\ndata: {train: x}\ntraining: {steps: 1}\nrun: {folder: '${SECRET_PLACE}'}\n")
    assert "expanded:" in str(caught.value)
    assert "/expanded" not in str(caught.value)


# ---------------------------------------------------------------- rules between keys


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": {"divergence": "forward_kl"}}, "there is no teacher section"),
        ({"teacher": {"path": "t"}, "objective": {"divergence": "cross_entropy"}}, "never asks"),
        ({"teacher": {"path": "t"}, "objective": {"divergence": "forward_kl", "beta": 0.5}}, "beta"),
        ({"teacher": {"path": "t"}, "objective": {"divergence": "jsd", "alpha": 0.5}}, "it has beta"),
        ({"teacher": {"path": "t"}, "objective": {"divergence": "jsd", "beta": 1.0}}, "forward_kl"),
        ({"teacher": {"path": "t"}, "objective": {"divergence": "jsdd"}}, "jsd"),
        ({"objective": {"divergence": "cross_entropy", "temperature": 2.0}}, "objective.temperature"),
        ({"teacher": {"path": "t"}, "objective": {"kd_ratio": 1.5}}, "objective.kd_ratio: must be at most 1"),
        ({"teacher": {"path": "t"}, "objective": {"kd_ratio": 0.5, "kd_weight": 1, "sft_weight": 1}}, "leave out kd_ratio, or both"),
        ({"teacher": {"path": "t"}, "objective": {"kd_weight": 1}}, "objective.kd_weight: is set and sft_weight is not; set both"),
        ({"teacher": {"path": "t"}, "objective": {"kd_weight": 0, "sft_weight": 0}}, "nothing would be learned"),
        ({"teacher": {"path": "t"}, "objective": {"kd_weight": -1, "sft_weight": 1}}, "objective.kd_weight: must be at least 0"),
        ({"objective": {"divergence": "cross_entropy", "kd_weight": 1, "sft_weight": 1}}, "kd_weight: cross_entropy asks no teacher"),
        ({"teacher": {"path": "t"}, "objective": {"support": "top_k_renormalised", "top_k": 1}}, "nothing would be learned"),
        ({"training": {"steps": 1, "epochs": 1}}, "exactly one of epochs and steps; found both; take one away, as in training.epochs=null"),
        ({"training": {}}, "exactly one of epochs and steps"),
        ({"training": {"steps": 1, "early_stopping": {"patience": 2}}}, "data.validation"),
        ({"training": {"steps": 1, "eval_steps": 2}}, "data.validation"),
        ({"student": {"path": "a", "trust_remote_code": True}}, "40 hexadecimal digits"),
        ({"student": {"path": "a", "quantization": "4bit"}}, "add lora"),
        ({"data": {"train": "x", "validation": 1.5}}, "fraction"),
        ({"data": {"train": "x", "columns": {"prompt": "p"}}}, "prompt"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_way_out(change, said):
    assert said in refusal(MINIMAL | change)


def test_without_an_objective_a_teacher_decides():
    assert recipe_from_values(WITH_TEACHER).objective == ObjectiveConfig(divergence="forward_kl", kd_ratio=0.5)
    assert recipe_from_values(MINIMAL).objective.divergence == "cross_entropy"
    assert recipe_from_values(MINIMAL | {"objective": None, "teacher": None}).objective.divergence == "cross_entropy"


def test_two_weights_stand_in_place_of_the_ratio_and_outlive_their_record():
    recipe = recipe_from_values(WITH_TEACHER | {"objective": {"kd_weight": 1.5, "sft_weight": 0.2}})
    assert (recipe.objective.kd_ratio, recipe.objective.weights) == (None, (1.5, 0.2))
    recorded = recipe.resolved()
    assert recipe_from_values(recorded).objective == recipe.objective
    of_ratio = recipe_from_values(WITH_TEACHER | {"objective": {"kd_ratio": 0.25}})
    assert of_ratio.objective.weights == (0.25, 0.75)
    assert recipe_from_values(of_ratio.resolved()).objective == of_ratio.objective
    changed = {change.key: change.allowed for change in recipe_changes(of_ratio.resolved(), recorded)}
    assert changed == dict.fromkeys(("objective.kd_ratio", "objective.kd_weight", "objective.sft_weight"))
    assert not recipe_from_values(WITH_TEACHER | {"objective": {"kd_weight": 0, "sft_weight": 2}}).objective.asks_teacher


@pytest.mark.parametrize("divergence", [name for name in catalogue.PARAMETERS if name != "cross_entropy"])
def test_every_divergence_can_be_said_with_every_parameter_it_takes(divergence):
    given = dict(catalogue.PARAMETERS[divergence])
    recipe = recipe_from_values(WITH_TEACHER | {"objective": {"divergence": divergence, **given}})
    assert recipe.objective.given_parameters == given
    assert recipe.resolved()["objective"]["divergence"] == divergence
    assert recipe_from_values(recipe.resolved()).objective.parameters == recipe.objective.parameters


def test_the_objective_has_a_key_for_every_parameter_of_the_catalogue():
    tables = (catalogue.PARAMETERS, catalogue.SUPPORTS, catalogue.TOKEN_WEIGHTS)
    named = {name for table in tables for parameters in table.values() for name in parameters}
    own = {
        "divergence", "kd_ratio", "kd_weight", "sft_weight", "temperature", "scale_by_temperature_squared", "support", "token_weight",
        "reduction", "row_cap", "policy", "on_student_text",
    }  # fmt: skip
    assert set(PARAMETER_KEYS) == named
    assert set(ObjectiveConfig.model_fields) == named | own


def test_a_missing_recipe_names_the_nearest_of_the_library():
    with pytest.raises(ConfigError, match=r"near it: qwen2-0\.5b-sft"):
        read_recipe("qwen2-0.5b-stf")
