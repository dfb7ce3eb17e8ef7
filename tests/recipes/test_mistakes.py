"""What is said of a wrong value: the place that is wrong, once, and what would be right there."""

import pytest

from potstill.errors import ConfigError
from potstill.recipes.fitting import Answers, known_answers, settled
from potstill.recipes.read import recipe_from_values

SERVER = {"kind": "server", "url": "http://127.0.0.1:1", "model": "m"}
TWO = {"kind": "ensemble", "teachers": {"a": {"path": "x"}, "b": SERVER}}
MINIMAL = {"student": {"path": "a/b"}, "data": {"train": "x.jsonl"}, "training": {"steps": 1}, "run": {"folder": "runs/x"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"train": [{"path": "x", "weigth": 1}]}}, "data.train[0].weigth: unknown key; did you mean weight?"),
        ({"data": {"train": [{"path": "x", "weight": -1}]}}, "data.train[0].weight: must be above 0"),
        ({"data": {"train": "x", "validation": {"path": "y", "splt": "a"}}}, "data.validation.splt: unknown key; did you mean split?"),
        ({"data": {"train": "x", "on_bad_line": {"skip": 0}}}, "data.on_bad_line.skip: must be at least 1"),
        ({"data": {"train": "x", "on_bad_line": "skip"}}, "data.on_bad_line: must be stop or a mapping"),
        ({"data": {"train": []}}, "data.train: must not be empty"),
        ({"training": {"steps": 1, "non_finite": {"skip": 0}}}, "training.non_finite.skip: must be at least 1"),
        ({"student": [{"pth": "a"}]}, "student: must be a mapping"),
        ({"data": {"train": {"pth": "a"}}}, "data.train: must be text or a list"),
    ],
)
def test_of_a_key_with_several_kinds_only_the_kind_that_was_meant_complains(change, said):
    with pytest.raises(ConfigError) as caught:
        recipe_from_values(MINIMAL | change)
    lines = str(caught.value).splitlines()
    assert said in "\n".join(lines)
    assert len(lines) == (2 if "pth" in str(change) else 1), lines


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"format": "text"}, r"rollouts\.prompt_tokens: rows of the format text have no prompt"),
        ({"max_tokens": 64}, r"rollouts\.sampling\.max_new_tokens: 256 and a prompt do not fit"),
    ],
)
def test_a_rule_about_a_key_that_is_not_written_names_the_whole_key(data, said):
    given = {"data": {"train": "x", **data}, "teacher": {"kind": "local", "path": "t"}, "rollouts": {"author": "student"}}
    with pytest.raises(ConfigError, match=rf"^\S+: {said}"):
        recipe_from_values(MINIMAL | given)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"kind": "cache", "pth": "x"}, "teacher.pth: unknown key; did you mean path? allowed here: kind, path, model"),
        ({"kind": "cach", "path": "x"}, 'teacher.kind: must be one of local, cache, server, ensemble or self; found "cach"'),
        ({"kind": None, "path": "x"}, "teacher.kind: must be one of local, cache, server, ensemble or self; found nothing (null)"),
        ({"kind": ["a"], "path": "x"}, "teacher.kind: must be one of local, cache, server, ensemble or self; found a list"),
        (5, "teacher: must be a mapping (key: value); found 5"),
        ({"path": "x", "url": "http://x"}, "teacher.url: unknown key; it belongs to kind: server; allowed here: path"),
        (SERVER | {"sharded": True}, "teacher.sharded: unknown key; it belongs to kind: local"),
        ({"kid": "server", "url": "http://x", "model": "m"}, "teacher.kid: unknown key; did you mean kind?"),
        ({"kind": "cache", "path": "x", "model": {"path": "y", "revison": "z"}}, "teacher.model.revison: unknown key; did you mean rev"),
        ({"kind": "ensemble", "teachers": {"a": {"pth": "x"}}}, "teacher.teachers.a.pth: unknown key; did you mean path?"),
        ({"kind": "ensemble", "teachers": {"a": SERVER | {"ur": 1}}}, "teacher.teachers.a.ur: unknown key; did you mean url?"),
        (
            {"kind": "ensemble", "teachers": {"a": {"kind": "ensemble"}}},
            'teacher.teachers.a.kind: must be one of local, cache or server; found "ensemble"',
        ),
        (SERVER | {"url": "http://me:key@x"}, "teacher.url: a name or a key in the address would stand in logs"),
        (TWO, "teacher.teachers.b: a mean needs whole distributions"),
    ],
)
def test_a_mistake_in_a_teacher_is_said_of_the_kind_that_was_chosen(teacher, said):
    with pytest.raises(ConfigError) as caught:
        recipe_from_values(MINIMAL | {"teacher": teacher})
    assert said in str(caught.value)
    if "pth" not in str(teacher) and "kid" not in str(teacher):  # there something is missing too
        assert len(str(caught.value).splitlines()) == 1, str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": SERVER, "objective": {"support": "full"}}, "full asks for more than teacher (a server) gives"),
        ({"teacher": SERVER, "objective": {"divergence": "dkd"}}, "dkd needs every token as an outcome"),
        ({"teacher": SERVER, "objective": {"support": "top_k_tail", "top_k": 21}}, "21 asked, and teacher (a server) gives 20"),
        ({"teacher": SERVER, "objective": {"temperature": 2.0}}, "answers at 1; set objective.temperature=1"),
        ({"teacher": SERVER, "capture": {"path": "c", "k": 64}}, "capture.k: 64 is more than teacher.top_k: 20"),
        ({"teacher": SERVER, "capture": {"path": "c", "outcomes": "hidden"}}, "capture.outcomes: teacher is a server"),
        ({"capture": {"path": "c"}}, "capture: there is no teacher section"),
        ({"teacher": {"path": "t"}, "capture": {"path": "c", "outcomes": "projected"}}, "without student.lora every weight learns"),
        ({"teacher": {"path": "t"}, "capture": {"path": "c", "outcoms": "top_k"}}, "capture.outcoms: unknown key; did you mean outcomes?"),
        ({"teacher": {"path": "t"}, "capture": {"path": "c", "outcomes": "hidden", "k": 3}}, "capture.k: hidden outcomes do not use it"),
        ({"teacher": SERVER, "objective": {"divergence": "cross_entropy"}}, "cross_entropy never asks the teacher"),
        (
            {"teacher": {"kind": "ensemble", "teachers": {"a": {"path": "x"}}}, "capture": {"path": "c", "outcomes": "hidden"}},
            "hidden rows belong to one head",
        ),
    ],
)
def test_a_teacher_that_cannot_serve_is_refused_naming_both_sides(change, said):
    with pytest.raises(ConfigError) as caught:
        recipe_from_values(MINIMAL | change)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "support", "sizes"),
    [
        ({}, "top_k_tail", {"top_k": 20}),
        ({"divergence": "reverse_kl"}, "top_k_tail", {"top_k": 20}),
        ({"support": "top_k_renormalised", "top_k": 5}, "top_k_renormalised", {"top_k": 5}),
        ({"support": "top_k_renormalised", "temperature": 2.0}, "top_k_renormalised", {"top_k": 20}),
    ],
)
def test_where_no_support_is_named_the_teachers_own_is_taken(objective, support, sizes):
    recipe = recipe_from_values(MINIMAL | {"teacher": SERVER, "objective": objective})
    answers = known_answers("teacher", recipe.teacher)
    assert answers is not None
    taken = settled(recipe.objective, answers)
    assert taken.support == support
    assert {name: taken.parameters[name] for name in sizes} == sizes
    assert settled(taken, answers) == taken


@pytest.mark.parametrize(
    ("outcomes", "divergence", "support"),
    [
        ("sampled", "forward_kl", "samples"), ("top_k_sampled", "forward_kl", "samples"), ("top_k_sampled", "jsd", "top_k_tail"),
        ("hidden", "jsd", "full"), ("top_k", "jsd", "top_k_tail"),
    ],
)  # fmt: skip
def test_a_record_has_a_support_of_its_own(outcomes, divergence, support):
    objective = recipe_from_values(MINIMAL | {"teacher": {"path": "t"}, "objective": {"divergence": divergence}}).objective
    assert settled(objective, Answers("the cache c", outcomes, k=7, num_samples=9, temperature=1.0)).support == support


def test_samples_serve_forward_kl_alone():
    objective = recipe_from_values(MINIMAL | {"teacher": {"path": "t"}, "objective": {"divergence": "jsd"}}).objective
    with pytest.raises(ValueError, match=r"the cache c gives sampled outcomes.*forward_kl alone"):
        settled(objective, Answers("the cache c", "sampled", num_samples=9))
