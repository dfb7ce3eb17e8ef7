"""DistiLLM's schedule: scripted validation losses give the exact thresholds, and a seed the exact branches."""

import pytest

from potstill.rollouts.config import ReplayConfig
from potstill.rollouts.schedule import Schedule
from potstill.rollouts.writing import uniform


def _thresholds(losses, *, num_steps=100, **config):
    schedule = Schedule(ReplayConfig(**config), seed=5, num_steps=num_steps)
    found = []
    for loss in losses:
        schedule.validated(loss)
        found.append(round(schedule.threshold, 12))
    return found


# Worked out by hand from the rule: worse by the margin than the level raises both, anything else changes neither.
LOSSES = [3.0, 2.5, 3.0, 3.125, 3.125, 3.2, 3.25, 2.0, 3.3, 3.4, 9.0, 10.0]
LEVELS = [3.0, 3.0, 3.0, 3.125, 3.125, 3.125, 3.25, 3.25, 3.25, 3.4, 9.0, 10.0]
THRESHOLDS = [0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 1.0, 1.0]


def test_scripted_losses_give_the_exact_thresholds_and_levels():
    config = ReplayConfig(rise=0.25, margin=0.125)
    schedule, found = Schedule(config, seed=5, num_steps=100), []
    for loss in LOSSES:
        schedule.validated(loss)
        found.append((schedule.level, schedule.threshold))
    assert found == list(zip(LEVELS, THRESHOLDS, strict=True))


def test_a_loss_worse_by_exactly_the_margin_is_worse():
    assert _thresholds([1.0, 1.0 + 2**-4], margin=2**-4, rise=0.5) == [0.0, 0.5]
    assert _thresholds([1.0, 1.0 + 2**-4 - 2**-40], margin=2**-4, rise=0.5) == [0.0, 0.0]


def test_the_defaults_are_the_papers():
    config = ReplayConfig()
    assert (config.capacity, config.start, config.rise, config.margin) == (1000, 0.0, 0.1, 0.1)


def test_a_constant_schedule_that_never_comes_to_the_student_is_refused():
    with pytest.raises(ValueError, match="start: 0, which a constant schedule never leaves"):
        ReplayConfig(schedule="constant")


def test_a_constant_schedule_follows_no_loss():
    assert _thresholds(LOSSES, schedule="constant", start=0.5) == [0.5] * len(LOSSES)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_says_nothing(loss):
    assert _thresholds([loss, 2.0, loss, 3.0], rise=0.25) == [0.0, 0.0, 0.0, 0.25]


def test_the_branches_are_those_of_the_rule():
    """The rule of the reference, by drawn number, threshold, place in the run, and whether the buffer is full."""
    num_steps, seen = 400, set()
    for threshold in (0.0, 0.3, 0.8, 1.0):
        schedule = Schedule(ReplayConfig(start=threshold), seed=11, num_steps=num_steps)
        for full in (False, True):
            for step in range(num_steps):
                r = uniform(11, step)
                if r < threshold * (1 - step / num_steps) or (not full and r < threshold):
                    expected = "fresh"
                elif r < threshold:
                    expected = "replayed"
                else:
                    expected = "others"
                assert schedule.branch(step, buffer_full=full) == expected
                seen.add((threshold, full, expected))
    assert {(0.0, True, "others"), (1.0, True, "fresh"), (1.0, True, "replayed"), (1.0, False, "fresh"), (0.8, False, "others")} <= seen
    assert not {(0.0, True, "fresh"), (0.0, False, "fresh"), (1.0, True, "others"), (0.3, False, "replayed")} & seen


# Written down once: a later version must draw what this one draws, or a resumed run would go another way.
SEQUENCE = "ffffforoffofroforofo"


def test_a_seed_gives_the_exact_branches():
    schedule = Schedule(ReplayConfig(start=0.6), seed=3, num_steps=20)
    assert "".join(schedule.branch(step, buffer_full=True)[0] for step in range(20)) == SEQUENCE


def test_shares_of_the_branches_are_those_of_the_threshold():
    """Over a run the expected share of fresh text is half the threshold, for both schedules."""
    for name in ("distillm", "constant"):
        schedule = Schedule(ReplayConfig(start=0.6, schedule=name), seed=1, num_steps=4000)
        branches = [schedule.branch(step, buffer_full=True) for step in range(4000)]
        assert branches.count("fresh") / 4000 == pytest.approx(0.3, abs=0.03)
        assert branches.count("replayed") / 4000 == pytest.approx(0.3, abs=0.03)


def test_fresh_text_becomes_rarer_and_a_longer_run_than_planned_replays():
    schedule = Schedule(ReplayConfig(start=1.0), seed=1, num_steps=1000)
    branches = [schedule.branch(step, buffer_full=True) for step in range(1100)]
    quarters = [branches[first : first + 250].count("fresh") / 250 for first in (0, 250, 500, 750)]
    assert quarters == pytest.approx([0.875, 0.625, 0.375, 0.125], abs=0.08)
    assert set(branches[1000:]) == {"replayed"}


def test_a_schedule_comes_back():
    schedule = Schedule(ReplayConfig(rise=0.25), seed=5, num_steps=10)
    for loss in LOSSES[:5]:
        schedule.validated(loss)
    other = Schedule(ReplayConfig(rise=0.25), seed=5, num_steps=10)
    other.restore(schedule.state())
    for loss in LOSSES[5:]:
        schedule.validated(loss)
        other.validated(loss)
        assert (schedule.threshold, schedule.level) == (other.threshold, other.level)


def test_of_a_new_run_nothing_is_restored():
    schedule = Schedule(ReplayConfig(start=0.5), seed=5, num_steps=10)
    schedule.restore({})
    assert (schedule.threshold, schedule.level) == (0.5, None)
