"""What of a recipe fits text that a model writes: each refusal names its key and the way out, and what fits means what it says."""

import pytest

from potstill.errors import ConfigError
from potstill.recipe_changes import recipe_changes
from potstill.recipes.objectives import make_objectives
from potstill.recipes.read import recipe_from_values, refuse_command
from potstill.recipes.schema import ObjectiveConfig

BASE = {
    "student": {"path": "a/b"}, "teacher": {"path": "c/d"}, "data": {"train": "x.jsonl"}, "training": {"steps": 1},
    "run": {"folder": "runs/x"},
}  # fmt: skip
LORA = {"path": "a/b", "lora": {"rank": 2}}
SERVER = {"kind": "server", "url": "http://127.0.0.1:1", "model": "m"}
CACHE = {"kind": "cache", "path": "c"}
SELF = {"kind": "self", "weights": "average"}
WRITTEN = {"divergence": "reverse_kl", "support": "written"}
KL = {"divergence": "reverse_kl"}


def recipe(**sections):
    return recipe_from_values({name: value for name, value in {**BASE, **sections}.items() if value is not None})


def student(**more):
    return {"author": "student", **more}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rollouts": {"author": "mixture"}, "data": {"train": "x", "packing": True}}, "data.packing: what a model writes"),
        ({"rollouts": student(), "data": {"train": "x.txt", "format": "text"}}, "prompt_tokens: rows of the format text have no prompt"),
        ({"rollouts": student(prompt_tokens=4)}, "prompt_tokens: is for the format text"),
        ({"rollouts": student(), "data": {"train": "x", "max_tokens": 256}}, "max_new_tokens: 256 and a prompt do not fit"),
        ({"rollouts": student(student=0.5)}, "student: is of the author mixture, and the author is student"),
        ({"rollouts": student(), "teacher": CACHE}, "teacher.kind: a cache holds answers to the rows of the data set"),
        ({"rollouts": {"author": "teacher"}, "teacher": CACHE, "objective": {"kd_ratio": 0}}, "teacher.kind: a cache holds answers"),
        ({"rollouts": student(), "teacher": None}, "rollouts.author: without a teacher there is nothing to learn"),
        ({"rollouts": {"author": "teacher"}, "teacher": None}, "rollouts.author: teacher needs a teacher that writes"),
        ({"rollouts": {"author": "teacher"}, "teacher": SELF}, "lets the teacher write, and it is the student itself"),
        (
            {"rollouts": {"author": "teacher"}, "teacher": {"kind": "ensemble", "teachers": {"a": {"path": "c"}}}},
            "lets the teacher write, and it is several teachers",
        ),
        ({"rollouts": {"author": "teacher_mixed"}, "teacher": SERVER}, "teacher_mixed draws each token from both"),
        ({"rollouts": {"author": "teacher"}, "teacher": SERVER | {"backend": "sglang"}}, "teacher.backend: sglang is not asked to write"),
        ({"rollouts": {"author": "teacher"}, "teacher": {"path": "c", "sharded": True}}, "teacher.sharded: a teacher that writes"),
        ({"rollouts": student(), "objective": {"divergence": "cross_entropy"}}, "objective.divergence: the student's own text"),
        ({"rollouts": student(), "objective": {"kd_ratio": 0}}, "objective.kd_ratio: the student's own text"),
        (
            {"rollouts": student(), "objective": {"on_student_text": {**KL, "kd_ratio": 0.5}}},
            "objective.on_student_text.kd_ratio: there is no cross-entropy",
        ),
        (
            {"rollouts": student(), "objective": {"on_student_text": {**KL, "kd_weight": 1, "sft_weight": 1}}},
            "objective.on_student_text.sft_weight: there is no cross-entropy",
        ),
        ({"objective": WRITTEN}, "objective.support: written credits tokens that the student drew, and there is no rollouts section"),
        ({"objective": {**KL, "policy": {}}}, "objective.policy: is for text that the student writes"),
        ({"objective": {"on_student_text": KL}, "rollouts": {"author": "teacher"}}, "objective.on_student_text: is for text"),
        ({"objective": WRITTEN, "rollouts": {"author": "mixture"}}, "put it under objective.on_student_text"),
        ({"objective": WRITTEN, "rollouts": student(sampling={"top_p": 0.9})}, "rollouts.sampling: objective credits the tokens"),
        ({"objective": WRITTEN, "rollouts": student(sampling={"temperature": 0})}, "rollouts.sampling: objective credits the tokens"),
        (
            {"rollouts": student(sampling={"top_k": 9}, reward={"function": "f.py:g"}), "objective": KL},
            "rollouts.sampling: rollouts.reward credits the tokens",
        ),
        ({"rollouts": {"author": "teacher", "reward": {"function": "f.py:g"}}}, "rollouts.reward: is for what the student writes"),
        ({"rollouts": student(), "teacher": SERVER, "objective": KL | {"support": "full"}}, "objective.support: full asks for more"),
        ({"rollouts": student(), "teacher": SERVER, "objective": WRITTEN | {"policy": {"baseline": "kl"}}}, "baseline: kl needs whole"),
        (
            {"rollouts": student(), "teacher": SERVER, "objective": KL | {"support": "student_top_k_tail"}},
            "student_top_k_tail asks for more",
        ),
        ({"rollouts": student(generator={"kind": "vllm", "url": "http://x", "model": "m", "weights": "adapter"})}, "add student.lora"),
        (
            {"rollouts": {"author": "teacher_mixed", "generator": {"kind": "vllm", "url": "http://x", "model": "m"}}},
            "teacher_mixed is written in this process",
        ),
        ({"rollouts": {"author": "replay"}, "objective": KL}, "lets the student write once the validation loss has risen"),
        ({"teacher": {"kind": "self"}}, "base is the student without its adapter, and it has none"),
        ({"teacher": {"kind": "self", "weights": "live"}}, "the same at every token"),
        ({"teacher": SELF, "training": {"steps": 1, "fsdp": True}}, "training.fsdp: a student that is its own teacher"),
        ({"teacher": CACHE, "data": {"train": "x", "teacher_prompt": "{prompt}"}}, "data.teacher_prompt: teacher holds answers"),
        ({"teacher": None, "data": {"train": "x", "teacher_prompt": "{prompt}"}}, "data.teacher_prompt: there is no teacher to read it"),
    ],
)
def test_what_cannot_go_together_is_refused_by_its_key_with_the_way_out(sections, said):
    with pytest.raises(ConfigError) as caught:
        recipe(**sections)
    assert said in str(caught.value)
    assert ";" in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "weights"),
    [
        ({"rollouts": student()}, (1.0, 0.0)),
        ({"rollouts": student(), "objective": {"kd_weight": 0.7, "sft_weight": 0.4}}, (0.7, 0.0)),
        ({"rollouts": {"author": "mixture"}, "objective": {"divergence": "cross_entropy", "on_student_text": KL}}, (1.0, 0.0)),
        ({"rollouts": {"author": "mixture"}, "objective": {"on_student_text": {**KL, "kd_weight": 2, "sft_weight": 0}}}, (2.0, 0.0)),
        ({"rollouts": student(), "teacher": SERVER, "objective": WRITTEN}, (1.0, 0.0)),
        ({"rollouts": {"author": "teacher"}, "objective": {"divergence": "cross_entropy"}}, None),
        ({"rollouts": {"author": "dataset"}, "teacher": CACHE}, None),
        ({"rollouts": student(), "teacher": {"kind": "self"}, "student": LORA}, (1.0, 0.0)),
    ],
)
def test_the_students_text_is_never_learned_by_cross_entropy_and_the_record_is_the_same_recipe(sections, weights):
    read = recipe(**sections)
    assert (read.student_objective and read.student_objective.weights) == weights
    assert read.data.packing is False
    assert read.uses_teacher == (read.rollouts.author != "dataset" or read.objective.asks_teacher)
    assert recipe_from_values(read.resolved()).resolved() == read.resolved()


def test_each_stream_has_its_objective():
    names = {"student": {"dataset", "student"}, "teacher": {"dataset", "teacher"}, "mixture": {"dataset", "student"}}
    for author, streams in names.items():
        made = make_objectives(recipe(rollouts={"author": author}, objective={"divergence": "jsd", "kd_ratio": 0.5}), 9)
        assert set(made) == streams
        assert (made["dataset"].plan.kd_weight, made["dataset"].plan.sft_weight) == (0.5, 0.5)
        if "student" in made:
            assert (made["student"].plan.kd_weight, made["student"].plan.sft_weight) == (1.0, 0.0)
    pair = recipe(
        rollouts={"author": "pair", "others": "teacher", "text": {"path": "t.txt"}},
        objective={"divergence": "skew_forward_kl", "kd_ratio": 1.0, "on_student_text": {"divergence": "skew_reverse_kl"}},
    )
    made = make_objectives(pair, 9)
    assert set(made) == {"dataset", "teacher", "student", "text"}
    assert [made[name].plan.divergence for name in ("dataset", "teacher", "student")] == ["skew_forward_kl"] * 2 + ["skew_reverse_kl"]
    assert made["text"].needs.outcomes == "nothing"


def test_what_is_measured_on_the_validation_set_needs_no_drawn_tokens():
    local = make_objectives(recipe(rollouts=student(), objective=WRITTEN), 9)
    assert (local["student"].needs.outcomes, local["dataset"].needs.outcomes) == ("target", "full")
    assert local["dataset"].plan.divergence == "reverse_kl"
    served = make_objectives(recipe(rollouts=student(), objective=WRITTEN, teacher=SERVER), 9)
    assert (served["student"].needs.outcomes, served["dataset"].needs.outcomes) == ("target", "nothing")


def test_an_objective_of_the_students_text_takes_what_a_server_has():
    read = recipe(rollouts={"author": "mixture"}, teacher=SERVER, objective={"divergence": "forward_kl", "on_student_text": WRITTEN})
    from potstill.recipes.recorded import settle

    settled, said = settle(read, {})
    assert (settled.objective.support, settled.objective.on_student_text.support) == ("top_k_tail", "written")
    assert said == ["objective.support=top_k_tail, objective.top_k=20: what teacher (a server) gives"]


def test_a_default_is_the_same_whether_it_is_said_or_not():
    assert ObjectiveConfig.model_validate({"on_student_text": {}}).on_student_text.weights == (1.0, 0.0)
    with pytest.raises(ConfigError, match="would not ask it"):
        refuse_command("finetune", recipe(rollouts=student()), "r.yaml")


def test_who_writes_may_not_change_under_a_run_and_how_often_it_is_watched_may():
    before = recipe(rollouts=student()).resolved()
    watched = recipe(rollouts=student(watch={"max_cut": 0}, keep_texts=9, generator={"kind": "local", "batch_size": 4})).resolved()
    assert all(change.allowed for change in recipe_changes(before, watched))
    for other in (student(sampling={"temperature": 0.5}), {"author": "mixture"}, student(cut_answers="drop")):
        changes = recipe_changes(before, recipe(rollouts=other).resolved())
        assert any(change.allowed is None for change in changes)
