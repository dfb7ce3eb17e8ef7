"""The laws that every distance obeys, over the whole table, and the numbers of the reference fixture.

The reference is another definition (tests/objectives/reference.py); the fixture numbers were computed outside this repository.
"""

import inspect
import math

import pytest
import torch
from torch import Tensor

from objectives import reference
from potstill.objectives import DIVERGENCES
from potstill.objectives.catalogue import NEEDS_TARGETS, PARAMETERS
from potstill.objectives.divergences import GRADIENTS
from potstill.objectives.pair import make_pair

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
# Every divergence with its defaults, and with parameters that take another branch.
CASES = [(name, {}) for name in PARAMETERS] + [
    ("jsd", {"beta": 0.1}), ("jsd", {"beta": 0.9, "jsd_normalize": True}), ("skew_forward_kl", {"alpha": 0.4}),
    ("skew_forward_kl", {"alpha": 0.0}), ("skew_reverse_kl", {"alpha": 0.3, "detach_mixture": True}), ("skew_reverse_kl", {"alpha": 0.0}),
    ("mixed_kl", {"forward_weight": 0.8}), ("adaptive_kl", {"mu": 0.9}), ("alpha_beta", {"alpha": 0.2, "beta": 0.7}),
    ("alpha_beta", {"alpha": 1.0, "beta": 1.0}), ("alpha_beta", {"alpha": 1.5, "beta": -0.5}), ("dkd", {"alpha": 2.0, "beta": 0.5}),
]
DISTANCES = [case for case in CASES if case[0] != "cross_entropy"]
IDS = [f"{name}-{parameters}" for name, parameters in CASES]
DISTANCE_IDS = [f"{name}-{parameters}" for name, parameters in DISTANCES]


def rows(num_rows=6, num_outcomes=7, seed=0, dtype=torch.float64, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_rows, num_outcomes, generator=generator, dtype=dtype) * spread for _ in range(2))
    return student, teacher, torch.randint(0, num_outcomes, (num_rows,), generator=generator)


def call(name, student_log_probs, teacher_log_probs, targets, parameters):
    extra = {"targets": targets} if name in NEEDS_TARGETS else {}
    return DIVERGENCES[name](student_log_probs, teacher_log_probs, **extra, **parameters)


def closed(name, student_log_probs, teacher_log_probs, targets, parameters):
    extra = {"targets": targets} if name in NEEDS_TARGETS else {}
    return GRADIENTS[name](make_pair(student_log_probs, teacher_log_probs), **extra, **parameters)


def auto(name, logits, teacher_log_probs, targets, parameters, temperature=1.0) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = call(name, (logits / temperature).log_softmax(-1), teacher_log_probs, targets, parameters)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def test_one_table_holds_the_catalogue():
    assert list(DIVERGENCES) == list(PARAMETERS)
    for name, parameters in PARAMETERS.items():
        own = [place for place in inspect.signature(DIVERGENCES[name]).parameters.values() if place.kind is place.KEYWORD_ONLY]
        assert {place.name: place.default for place in own if place.name != "targets"} == parameters, name


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("name", "parameters"), CASES, ids=IDS)
def test_value_and_gradient_are_those_of_the_reference(name, parameters, temperature):
    student, teacher, targets = rows()
    teacher_log_probs = (teacher / temperature).log_softmax(-1)
    value, by_autograd = auto(name, student, teacher_log_probs, targets, parameters, temperature)
    also_value, in_closed_form = closed(name, (student / temperature).log_softmax(-1), teacher_log_probs, targets, parameters)
    for row in range(len(student)):
        target = {"target": int(targets[row])} if name in NEEDS_TARGETS else {}
        lists = student[row].tolist(), teacher[row].tolist()
        wanted = reference.value(name, *lists, temperature, **target, **parameters)
        slope = torch.tensor(reference.gradient(name, *lists, temperature, **target, **parameters), dtype=torch.float64)
        assert value[row].item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        assert also_value[row].item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        torch.testing.assert_close(by_autograd[row], slope, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(in_closed_form[row] / temperature, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=IDS)
def test_closed_form_equals_autograd(name, parameters):
    student, teacher, targets = rows(num_outcomes=23, seed=1)
    log_probs = teacher.log_softmax(-1)
    value, gradient = auto(name, student, log_probs, targets, parameters)
    also_value, in_closed_form = closed(name, student.log_softmax(-1), log_probs, targets, parameters)
    torch.testing.assert_close(also_value, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(in_closed_form, gradient, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(in_closed_form.sum(-1), torch.zeros(len(student), dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("name", "parameters"), [c for c in CASES if c[0] != "adaptive_kl" and "detach_mixture" not in c[1]])
def test_gradcheck(name, parameters, temperature):
    student, teacher, targets = rows(num_rows=2)
    teacher_log_probs = (teacher / temperature).log_softmax(-1)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: call(name, (logits / temperature).log_softmax(-1), teacher_log_probs, targets, parameters), (student,)
    )


@pytest.mark.parametrize(("name", "parameters"), DISTANCES, ids=DISTANCE_IDS)
def test_not_negative_and_zero_with_zero_gradient_exactly_where_equal(name, parameters):
    student, teacher, targets = rows(num_rows=40, seed=2)
    away = call(name, student.log_softmax(-1), teacher.log_softmax(-1), targets, parameters)
    assert (away > 1e-4).all()
    value, gradient = closed(name, teacher.log_softmax(-1), teacher.log_softmax(-1), targets, parameters)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=IDS)
def test_a_constant_added_to_a_row_of_logits_changes_nothing(name, parameters):
    student, teacher, targets = rows(seed=3)
    plain = closed(name, student.log_softmax(-1), teacher.log_softmax(-1), targets, parameters)
    moved = closed(name, (student + 11).log_softmax(-1), (teacher - 7).log_softmax(-1), targets, parameters)
    torch.testing.assert_close(moved, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "parameters"), [c for c in CASES if c[1].get("beta", 0) >= 0])
def test_columns_that_both_sides_exclude_count_for_nothing(name, parameters):
    student, teacher, targets = rows(seed=4)
    wide = [torch.cat([logits, torch.full((len(logits), 3), -torch.inf, dtype=torch.float64)], -1) for logits in (student, teacher)]
    value, gradient = auto(name, student, teacher.log_softmax(-1), targets, parameters)
    wide_value, wide_gradient = auto(name, wide[0], wide[1].log_softmax(-1), targets, parameters)
    also_value, in_closed_form = closed(name, wide[0].log_softmax(-1), wide[1].log_softmax(-1), targets, parameters)
    torch.testing.assert_close(wide_value, value)
    torch.testing.assert_close(also_value, value)
    for found in (wide_gradient, in_closed_form):
        torch.testing.assert_close(found[:, :7], gradient, rtol=1e-7, atol=1e-9)
        assert (found[:, 7:] == 0).all()


@pytest.mark.parametrize(("name", "parameters"), [c for c in DISTANCES if c[1].get("beta", 0) >= 0 and c[0] != "logit_mse"])
def test_finite_at_extremes_in_float32(name, parameters):
    student = torch.tensor([[60.0, 0.0, -60.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-80.0, 80.0, 0.0, 1.0]])
    teacher = torch.tensor([[-60.0, 0.0, 60.0, 3.0], [90.0, -90.0, 0.0, 0.0], [-80.0, 80.0, 0.0, 1.0]])
    value, gradient = closed(name, student.log_softmax(-1), teacher.log_softmax(-1), torch.tensor([1, 1, 1]), parameters)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    _, by_autograd = auto(name, student, teacher.log_softmax(-1), torch.tensor([1, 1, 1]), parameters)
    assert by_autograd.isfinite().all()


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, -0.5), (-0.5, 0.5), (0.005, 0.0), (0.0, 0.005), (1.0, 0.0)])
def test_a_wide_vocabulary_is_not_taken_for_an_infinite_distance(alpha, beta):
    """Sums over 100,000 outcomes are large numbers, and none; an outcome that one side excludes is another matter."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(1, 100_000, generator=generator) for _ in range(2))
    few = DIVERGENCES["alpha_beta"](student.log_softmax(-1), teacher.log_softmax(-1), alpha=alpha, beta=beta)
    many = DIVERGENCES["alpha_beta"](student.double().log_softmax(-1), teacher.double().log_softmax(-1), alpha=alpha, beta=beta)
    assert torch.isfinite(few).all()
    torch.testing.assert_close(few.double(), many, rtol=1e-4, atol=1e-3)
    excluding = student.clone()
    excluding[0, teacher.argmax()] = -torch.inf
    sides = (excluding, teacher) if beta <= 0 <= alpha else (teacher, excluding)  # with these the formula has a power of 0 below 0
    assert DIVERGENCES["alpha_beta"](*(side.log_softmax(-1) for side in sides), alpha=alpha, beta=beta).item() == math.inf


def test_an_outcome_that_only_one_side_allows_is_infinite_and_says_so():
    narrow, wide = torch.tensor([[0.0, 0.0, -torch.inf]]).log_softmax(-1), torch.zeros(1, 3).log_softmax(-1)
    assert DIVERGENCES["forward_kl"](narrow, wide).item() == math.inf
    assert DIVERGENCES["forward_kl"](wide, narrow).item() == pytest.approx(math.log(1.5))
    assert DIVERGENCES["reverse_kl"](wide, narrow).item() == math.inf
    assert DIVERGENCES["jsd"](narrow, wide).isfinite().all()
    assert DIVERGENCES["skew_forward_kl"](narrow, wide).item() <= -math.log(0.1)


FIXTURE = [
    ("forward_kl", {}, 0.2678686671, (-0.1, -0.2, 0.15, 0.15)),
    ("reverse_kl", {}, 0.2860843770, (-0.2036911713, -0.1384696666, 0.1221188411, 0.2200419968)),
    ("jsd", {"beta": 0.1}, 0.0238257828, None),
    ("jsd", {"beta": 0.5}, 0.0657814514, (-0.0363320902, -0.0378512298, 0.0335706986, 0.0406126214)),
    ("jsd", {"beta": 0.9}, 0.0250459114, None),
    ("jsd", {"beta": 0.5, "jsd_normalize": True}, 0.2631258, None),
    ("jsd", {"beta": 1e-4, "jsd_normalize": True}, 0.2678380433 / (1 - 1e-4), None),
    ("skew_forward_kl", {"alpha": 0.1}, 0.2124179650, (-0.0971130694, -0.1395221698, 0.1143282275, 0.1223070118)),
    ("skew_reverse_kl", {"alpha": 0.1}, 0.2199988402, (-0.1409055726, -0.1133024137, 0.1044985154, 0.1497094709)),
    ("skew_reverse_kl", {"alpha": 0.1, "detach_mixture": True}, 0.2199988402, (-0.1691758737, -0.1249618257, 0.1133514482, 0.1807862513)),
    ("mixed_kl", {"forward_weight": 0.5}, 0.2769765221, None),
    ("adaptive_kl", {"mu": 0.5}, 0.2830484254, None),
    ("adaptive_kl", {"mu": 0.6}, 0.2830484254, None),
    ("tvd", {}, 0.3, (-0.2, -0.05, 0.15, 0.1)),
    ("alpha_beta", {"alpha": 0.2, "beta": 0.7}, 0.3322846954, (-0.1995282629, -0.1795510063, 0.1444001102, 0.2346791591)),
    ("alpha_beta", {"alpha": 0.5, "beta": 0.5}, 0.2697971575, None),
    ("logit_mse", {}, 0.8788712923, (-0.2062824884, -0.6440168570, 0.2518628776, 0.5984364678)),
    ("cross_entropy", {}, 2.3025850930, (0.4, -0.9, 0.3, 0.2)),
]


@pytest.mark.parametrize(("name", "parameters", "wanted", "wanted_gradient"), FIXTURE)
def test_fixture_numbers(name, parameters, wanted, wanted_gradient):
    targets = torch.tensor([1])
    value, by_autograd = auto(name, Q.log()[None], P.log()[None], targets, parameters)
    also_value, in_closed_form = closed(name, Q.log()[None], P.log()[None], targets, parameters)
    assert value.item() == pytest.approx(wanted, abs=2e-8)
    assert also_value.item() == pytest.approx(wanted, abs=2e-8)
    if wanted_gradient is not None:
        for found in (by_autograd, in_closed_form):
            torch.testing.assert_close(found[0], torch.tensor(wanted_gradient, dtype=torch.float64), rtol=0, atol=2e-10)


def test_fixture_of_hinton_at_temperature_two():
    value = DIVERGENCES["forward_kl"]((Q.log() / 2).log_softmax(-1), (P.log() / 2).log_softmax(-1))
    assert 4 * value.item() == pytest.approx(0.3577013369, abs=1e-9)


def test_at_high_temperature_forward_kl_is_the_centred_squared_distance():
    mse = DIVERGENCES["logit_mse"](Q.log(), P.log()).item()
    assert mse / 2 == pytest.approx(0.439436, abs=1e-6)
    for temperature, wanted in ((10, 0.425522), (1000, 0.439305)):
        value = DIVERGENCES["forward_kl"]((Q.log() / temperature).log_softmax(-1), (P.log() / temperature).log_softmax(-1))
        assert temperature**2 * value.item() == pytest.approx(wanted, abs=1e-5)


def test_dkd_parts_and_identity():
    targets = torch.tensor([1])
    parts = [DIVERGENCES["dkd"](Q.log()[None], P.log()[None], targets=targets, alpha=a, beta=b).item() for a, b in ((1.0, 0.0), (0.0, 1.0))]
    assert parts == pytest.approx([0.1536635868, 0.1631501147], abs=1e-9)
    assert parts[0] + (1 - 0.3) * parts[1] == pytest.approx(0.2678686671, abs=1e-9)


def test_jsd_is_symmetric_with_the_other_weight_and_bounded():
    student, teacher, _ = (x.log_softmax(-1) if x.is_floating_point() else x for x in rows(num_rows=30, spread=8.0))
    one, other = DIVERGENCES["jsd"](student, teacher, beta=0.3), DIVERGENCES["jsd"](teacher, student, beta=0.7)
    torch.testing.assert_close(one, other)
    assert (DIVERGENCES["jsd"](student, teacher) <= math.log(2)).all()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_at_its_ends_names_what_to_use(beta):
    with pytest.raises(ValueError, match="forward_kl in place of 0, reverse_kl in place of 1"):
        DIVERGENCES["jsd"](Q.log(), P.log(), beta=beta)


@pytest.mark.parametrize(("alpha", "beta", "name"), [(1.0, 0.0, "forward_kl"), (0.0, 1.0, "reverse_kl")])
def test_limits_of_alpha_beta(alpha, beta, name):
    student, teacher, targets = rows(seed=5)
    wanted = closed(name, student.log_softmax(-1), teacher.log_softmax(-1), targets, {})
    found = closed("alpha_beta", student.log_softmax(-1), teacher.log_softmax(-1), targets, {"alpha": alpha, "beta": beta})
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    near = call("alpha_beta", student.log_softmax(-1), teacher.log_softmax(-1), targets, {"alpha": alpha or 2e-3, "beta": beta or 2e-3})
    torch.testing.assert_close(near, wanted[0], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, -0.5), (0.5, 0.0), (0.0, 0.5)])
def test_alpha_beta_where_the_general_formula_divides_by_zero(alpha, beta):
    student, teacher, targets = rows(seed=6, num_rows=3, spread=0.7)
    limit, gradient = closed("alpha_beta", student.log_softmax(-1), teacher.log_softmax(-1), targets, {"alpha": alpha, "beta": beta})
    near = {"alpha": alpha + 1.5e-3, "beta": beta + 1.5e-3}
    general = [
        reference.value("alpha_beta", s.tolist(), t.tolist(), **near) for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(limit, torch.tensor(general, dtype=torch.float64), rtol=3e-2, atol=0)
    _, by_autograd = auto("alpha_beta", student, teacher.log_softmax(-1), targets, {"alpha": alpha, "beta": beta})
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-8, atol=1e-10)


def test_adaptive_head_needs_no_sort_of_the_whole_vocabulary():
    """Heads of more than the first look's size give what a full sort gives."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(5, 3000, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    found = DIVERGENCES["adaptive_kl"](student, teacher, mu=0.9)
    wanted = [reference.value("adaptive_kl", s.tolist(), t.tolist(), mu=0.9) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
