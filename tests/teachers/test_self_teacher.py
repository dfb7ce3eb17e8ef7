"""The student as its own teacher: what it says, that nothing of the student changes by asking, and what a checkpoint keeps of it."""

import pytest
import torch

from potstill.batch import Example
from potstill.data.collation import collate
from potstill.errors import IncompatibleError
from potstill.objectives.distribution import DistributionMatching
from potstill.signals import FullOutcomes, Needs
from potstill.teachers.self_teacher import SelfTeacher
from potstill.teachers.teacher import Teacher, require, step_done
from potstill.training.distiller import Distiller
from potstill.training.saving import Kept
from small_runs import VOCABULARY, examples, make_student

KINDS = ("plain", "tied", "lora", "lora_head", "saved_head", "checkpointed")


def a_batch():
    return collate([[example] for example in examples(4)], pad_token=0)


def asked(teacher: SelfTeacher, batch=None) -> torch.Tensor:
    """The teacher's logits."""
    outcomes = teacher.score(a_batch() if batch is None else batch, Needs("full")).outcomes
    assert isinstance(outcomes, FullOutcomes)
    assert not outcomes.hidden.requires_grad
    assert not outcomes.head.weight.requires_grad
    return outcomes.head.logits(outcomes.hidden)


@torch.no_grad()
def said_by(student, batch=None) -> torch.Tensor:
    mode = student.training
    rows, head = student.eval()(a_batch() if batch is None else batch)
    student.train(mode)
    return head.logits(rows)


def a_step(student, seed: int = 0) -> None:
    """Something that an optimizer might do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_live_says_what_the_student_says_at_this_step(kind):
    student = make_student(kind, dropout=0.1).train()
    teacher = SelfTeacher(student, "live")
    assert torch.equal(asked(teacher), said_by(student))
    a_step(student)
    step_done(teacher)
    assert torch.equal(asked(teacher), said_by(student))


@pytest.mark.parametrize("kind", ["lora", "lora_head", "saved_head"])
def test_base_says_what_the_model_said_before_it_had_an_adapter(kind):
    student = make_student(kind).train()
    before = said_by(make_student("plain"))
    assert torch.equal(asked(SelfTeacher(student, "base")), before)
    a_step(student)
    assert torch.equal(asked(SelfTeacher(student, "base")), before)
    assert not torch.allclose(said_by(student), before, atol=1e-3)


def test_base_without_an_adapter_is_refused_with_the_ways_out():
    with pytest.raises(IncompatibleError, match=r"teacher\.weights: base is .* Set student\.lora, .*teacher\.kind: local"):
        SelfTeacher(make_student("plain"), "base")


@pytest.mark.parametrize("kind", ["tied", "lora_head", "saved_head"])
def test_average_is_the_moving_average_of_the_trained_weights(kind):
    student = make_student(kind)
    teacher = SelfTeacher(student, "average", decay=0.75)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    expected = {name: p.detach().double().clone() for name, p in trained.items()}
    assert torch.equal(asked(teacher), said_by(student))
    for number in range(3):
        a_step(student, number)
        teacher.step_done()
        expected = {name: 0.75 * value + 0.25 * trained[name].detach().double() for name, value in expected.items()}
    found = asked(teacher)
    other = make_student(kind)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in expected:
                parameter.copy_(expected[name])
    assert torch.allclose(found, said_by(other), atol=1e-5)
    assert not torch.allclose(found, said_by(student), atol=1e-3)


@pytest.mark.parametrize("weights", ["live", "base", "average"])
def test_asking_changes_nothing_of_the_student(weights):
    student = make_student("saved_head", dropout=0.3).train()
    next(student.modules()).training = False  # a part that someone has put in another mode
    frozen = next(p for name, p in student.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in student.named_parameters()}
    modes, random = [part.training for part in student.modules()], torch.random.get_rng_state()
    teacher = SelfTeacher(student, weights)
    a_batch_said = asked(teacher)
    teacher.step_done()
    assert torch.equal(asked(SelfTeacher(student, weights)), a_batch_said)
    assert [part.training for part in student.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, parameter in student.named_parameters():
        value, wanted, grad = before[name]
        assert torch.equal(parameter, value), name
        assert parameter.requires_grad is wanted, name
        assert parameter.grad is grad, name


def test_a_mistake_in_the_forward_leaves_the_student_as_it_was():
    student = make_student("lora").train()
    handle = student.trunk.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SelfTeacher(student, "base").score(a_batch(), Needs("full"))
    handle.remove()
    assert all(part.training for part in student.modules())
    assert torch.equal(asked(SelfTeacher(student, "live")), said_by(student))
    assert any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(("kind", "weights"), [("plain", "live"), ("plain", "average"), ("lora_head", "live"), ("saved_head", "average")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_who_sees_no_more_than_the_student_teaches_it_nothing(kind, weights, dtype):
    student = make_student(kind)
    objective = DistributionMatching(divergence="reverse_kl", kd_ratio=1.0, vocabulary_size=VOCABULARY)
    distiller, batch = Distiller(student, objective), a_batch()
    signal = SelfTeacher(student, weights, autocast=dtype).score(batch, objective.needs)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        total, _, _ = distiller(batch, signal)
    total.backward()
    largest = max(float(p.grad.abs().max()) for p in distiller.parameters() if p.grad is not None)
    assert abs(total.item()) < 1e-5
    assert largest < 1e-5


def test_without_rounding_as_the_student_does_it_would_teach_rounding():
    student, batch = make_student("plain"), a_batch()
    rounded = asked(SelfTeacher(student, "live", autocast=torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(rounded.float(), asked(SelfTeacher(student, "live"), batch))


@pytest.mark.parametrize("weights", ["live", "base"])
def test_with_more_in_its_prompt_it_says_what_the_student_would_say_there(weights):
    student = make_student("lora")
    rows = [Example([5, 6, 7, 8, 9], [False, False, True, True, True], 0, teacher_prompt=[11, 12, 13, 14, 6], prompt_length=2),
            Example([21, 22, 23, 24], [False, True, True, False], 1)]  # fmt: skip
    batch = collate([[row] for row in rows], pad_token=0)
    assert batch.teacher_view is not None
    found = asked(SelfTeacher(student, weights), batch.teacher_view)
    alone = [asked(SelfTeacher(student, weights), collate([[row.for_teacher()]], pad_token=0)) for row in rows]
    assert torch.allclose(found, torch.cat(alone), atol=1e-6)
    assert len(found) == batch.num_targets


def test_the_average_is_restored_bit_for_bit_and_goes_on_alike():
    def lived(restart_after: int | None):
        student = make_student("lora")
        teacher = SelfTeacher(student, "average", decay=0.9)
        for number in range(4):
            if number == restart_after:
                tensors, numbers = teacher.state()
                teacher = SelfTeacher(student, "average", decay=0.9)  # begun at the wrong weights
                teacher.restore(tensors, numbers)
            a_step(student, number)
            teacher.step_done()
        return teacher.state()[0]

    unbroken, broken = lived(None), lived(2)
    assert unbroken.keys() == broken.keys()
    assert all(torch.equal(unbroken[name], broken[name]) for name in unbroken)


def test_its_state_does_not_move_with_it():
    student = make_student("plain")
    teacher = SelfTeacher(student, "average")
    kept = {name: tensor.clone() for name, tensor in teacher.state()[0].items()}
    state = teacher.state()[0]
    a_step(student)
    teacher.step_done()
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_another_average_is_not_restored():
    teacher = SelfTeacher(make_student("lora"), "average")
    with pytest.raises(IncompatibleError, match=r"moving average of .* is .* there and absent in the run.*--fresh"):
        teacher.restore(SelfTeacher(make_student("saved_head"), "average").state()[0], {})
    with pytest.raises(IncompatibleError, match=r"is absent there"):
        teacher.restore({}, {})
    SelfTeacher(make_student("lora"), "base").restore({}, {})


def test_an_average_of_narrow_weights_is_not_lost_to_their_rounding():
    student = make_student("plain").to(torch.bfloat16)
    teacher = SelfTeacher(student, "average", decay=0.999)
    head = student.inner.lm_head.weight
    with torch.no_grad():
        head += 1
    before = teacher.state()[0]["model.lm_head.weight"]
    for _ in range(10):
        teacher.step_done()
    moved = teacher.state()[0]["model.lm_head.weight"] - before
    assert torch.allclose(moved, (1 - 0.999**10) * (head.detach().float() - before), atol=1e-6)
    assert asked(teacher).dtype == torch.bfloat16


def test_it_is_a_teacher_and_its_average_a_kept_part_and_it_is_no_module():
    teacher: Teacher = SelfTeacher(make_student("plain"), "average", decay=0.9)
    kept: Kept = SelfTeacher(make_student("plain"), "live")
    assert kept.state() == ({}, {})
    require(teacher, Needs("full"))
    assert teacher.identity != SelfTeacher(make_student("plain"), "average", decay=0.8).identity
    assert teacher.score(a_batch(), Needs()).outcomes is None
    assert not isinstance(teacher, torch.nn.Module)
    teacher.close()
