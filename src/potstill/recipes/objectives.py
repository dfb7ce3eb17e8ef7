"""From the objective section to what each stream of text is learned by. It knows the recipe's words; the formulas are in objectives."""

from shutil import which
from typing import Any, Literal

import torch

from potstill.objectives.distribution import DistributionMatching
from potstill.objectives.execution import Execution
from potstill.objectives.likelihood import Likelihood
from potstill.objectives.policy import PolicyGradient
from potstill.recipes.rollout_rules import by_drawn_tokens
from potstill.recipes.schema import ObjectiveConfig, PolicyConfig, Recipe
from potstill.teachers.config import ServerTeacherConfig
from potstill.training.distiller import Objective

# Compiling on a processor costs about half a minute; shorter runs do not earn it back.
_STEPS_WORTH_COMPILING = 1000


def make_objectives(recipe: Recipe, vocabulary_size: int, *, num_steps: int = 0) -> dict[str, Objective]:
    """An objective for each stream that a step may be taken on; that of "dataset" is also what the validation loss is."""
    execution = _execution(recipe, num_steps)
    made = {"dataset": make_objective(recipe, vocabulary_size, num_steps=num_steps)}
    rollouts = recipe.rollouts
    if rollouts is None:
        return made
    if rollouts.teacher_writes and rollouts.author != "teacher_mixed":
        made["teacher"] = make_objective(recipe, vocabulary_size, num_steps=num_steps)
    if (config := recipe.student_objective) is not None:
        reward = rollouts.reward.weight if rollouts.reward is not None else 0.0
        if by_drawn_tokens(config) or reward:
            made["student"] = _policy(config, reward, vocabulary_size, execution)
        else:
            made["student"] = _objective(config, vocabulary_size, execution)
    if rollouts.text is not None:
        made["text"] = Likelihood(vocabulary_size=vocabulary_size, execution=execution)
    return made


def make_objective(recipe: Recipe, vocabulary_size: int, *, num_steps: int = 0) -> Objective:
    """What text that stands there is learned by, and measured by, cropped to the tokens that both sides know."""
    return _objective(_of_given_text(recipe), vocabulary_size, _execution(recipe, num_steps))


def _of_given_text(recipe: Recipe) -> ObjectiveConfig:
    """The recipe's objective without what has a meaning on drawn tokens alone: it is then only measured, on the validation set."""
    objective = recipe.objective
    if not by_drawn_tokens(objective):
        return objective
    whole: dict[str, Any] = {"policy": None}
    if objective.support == "written":
        if isinstance(recipe.teacher, ServerTeacherConfig):
            return ObjectiveConfig(divergence="cross_entropy", reduction=objective.reduction)
        whole["support"] = "full"
    return objective.model_copy(update=whole)


def _objective(config: ObjectiveConfig, vocabulary_size: int, execution: Execution) -> Objective:
    if not config.asks_teacher:
        return Likelihood(
            reduction=config.reduction, vocabulary_size=vocabulary_size, execution=execution, sft_weight=config.weights[1]
        )
    kd_weight, sft_weight = config.weights
    return DistributionMatching(
        **_shared(config, vocabulary_size, execution), kd_weight=kd_weight, sft_weight=sft_weight,
        scale_by_temperature_squared=config.scale_by_temperature_squared,
    )  # fmt: skip


def _policy(config: ObjectiveConfig, reward_weight: float, vocabulary_size: int, execution: Execution) -> PolicyGradient:
    policy = config.policy or PolicyConfig()
    return PolicyGradient(
        **_shared(config, vocabulary_size, execution), kd_weight=config.weights[0], reward_weight=reward_weight, **policy.model_dump()
    )


def _shared(config: ObjectiveConfig, vocabulary_size: int, execution: Execution) -> dict[str, Any]:
    return {
        "divergence": config.divergence, "parameters": config.given_parameters, "temperature": config.temperature,
        "support": config.support, "token_weight": config.token_weight, "row_cap": config.row_cap, "reduction": config.reduction,
        "vocabulary_size": vocabulary_size, "execution": execution,
    }  # fmt: skip


def _execution(recipe: Recipe, num_steps: int) -> Execution:
    return Execution(compile=_compiles(recipe.training.compile, num_steps))


def _compiles(choice: Literal["auto", "on", "off"], num_steps: int) -> Literal["auto", "on", "off"]:
    """On a processor "auto" compiles long runs where there is a C++ compiler to do it with."""
    if choice != "auto" or torch.accelerator.is_available():
        return choice
    return "on" if num_steps >= _STEPS_WORTH_COMPILING and (which("c++") or which("g++")) else "off"
