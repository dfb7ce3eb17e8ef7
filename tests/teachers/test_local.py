"""A local teacher answers what its model says, learns nothing, and is refused where it cannot answer what is asked."""

import pytest
import torch

from potstill.batch import Batch
from potstill.errors import IncompatibleError
from potstill.models.causal_lm import CausalLM
from potstill.signals import FullOutcomes, Needs, Offers
from potstill.teachers.local import LocalTeacher
from potstill.teachers.teacher import Teacher, require
from tiny import tiny_llama


def a_batch() -> Batch:
    tokens = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(0))
    is_target = torch.arange(9)[None].repeat(2, 1) > 4
    return Batch(tokens, torch.arange(9).repeat(2, 1), torch.zeros_like(tokens), is_target)


def test_it_answers_what_its_model_says():
    model = tiny_llama().train()
    teacher: Teacher = LocalTeacher(CausalLM(model, 320))
    batch = a_batch()
    outcomes = teacher.score(batch, Needs("full")).outcomes
    assert isinstance(outcomes, FullOutcomes)
    assert len(outcomes) == batch.num_targets
    expected = model(input_ids=batch.tokens).logits[:, 4:-1].reshape(-1, 320)
    assert torch.allclose(outcomes.head.logits(outcomes.hidden), expected, atol=1e-6)
    assert not outcomes.hidden.requires_grad
    assert not outcomes.head.weight.requires_grad
    assert not model.training


def test_it_is_no_module_and_so_in_no_optimizer():
    student = torch.nn.Module()
    student.teacher = LocalTeacher(CausalLM(tiny_llama(), 320))
    assert list(student.parameters()) == []
    assert student.state_dict() == {}


def test_asked_for_nothing_it_computes_nothing():
    causal_lm = CausalLM(tiny_llama(), 320)
    causal_lm.trunk.register_forward_hook(lambda *_: pytest.fail("the teacher was run"))
    assert LocalTeacher(causal_lm).score(a_batch(), Needs()).outcomes is None


class Sampler:
    name, offers, identity = "the sampler", Offers(frozenset({"sampled"})), {}

    def score(self, batch, needs):
        raise AssertionError


def test_what_is_not_offered_is_refused_naming_both_sides():
    require(LocalTeacher(CausalLM(tiny_llama(), 320)), Needs("top_k"))
    require(Sampler(), Needs("sampled"))
    require(Sampler(), Needs())
    with pytest.raises(IncompatibleError, match="forward_kl asks for full outcomes of the teacher, but the sampler offers sampled"):
        require(Sampler(), Needs("full"), asked_by="forward_kl")
