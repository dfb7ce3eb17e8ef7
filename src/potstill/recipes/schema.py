"""What a recipe may say: its sections, each the configuration of its room, and the rules between them. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from potstill.capture.config import CaptureConfig
from potstill.config import Config
from potstill.data.config import DataConfig
from potstill.models.config import ModelConfig
from potstill.objectives import catalogue
from potstill.recipes.fitting import refuse_unfit
from potstill.recipes.rollout_rules import on_student_text, refuse_unfit_rollouts, without_packing
from potstill.rollouts.config import RolloutsConfig
from potstill.rollouts.generate_config import GenerateConfig
from potstill.teachers.config import TeacherConfig
from potstill.training.config import TrainingConfig

Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]


class PolicyConfig(Config):
    """How the student's own tokens are credited, where it learns from what it drew: support `written`, or a return beside a divergence."""

    baseline: Literal["none", "kl"] = "none"
    """written: kl takes the divergence at the position from the credit, which leaves the mean and lowers the noise; it needs the
    teacher's whole distribution."""
    future: Literal["none", "discounted", "mean"] = "none"
    """What of the tokens that follow is credited to a token: nothing, their log-ratios discounted, or their mean (MiniLLM)."""
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """discounted: what each further token counts less."""
    ratio: Literal["none", "truncate", "mask", "clip"] = "truncate"
    """The weight q / q_drawn of a token under today's student: left out, cut at ratio_limit, 0 beyond it, or PPO's clip."""
    ratio_limit: Annotated[float, Field(gt=1)] = 2.0
    """The largest weight; mask also takes out weights below its reciprocal, clip holds it within 1 / limit and limit."""


class ObjectiveConfig(Config):
    """Which distance between student and teacher, over which outcomes, and how it is mixed with cross-entropy.

    The parameters of the divergence, the support and the token weight stand flat beside them; a parameter that none of them takes
    is refused. What a parameter is where the recipe is silent stands in `potstill.objectives.catalogue` alone.
    """

    divergence: str = "forward_kl"
    """The distance; `cross_entropy` learns from the text alone and needs no teacher."""
    kd_ratio: Annotated[float | None, Field(ge=0, le=1)] = catalogue.KD_RATIO
    """The share of the divergence; cross-entropy has the rest. Null where the two weights below stand in its place."""
    kd_weight: Annotated[float | None, Field(ge=0)] = None
    """The weight of the divergence, in place of kd_ratio and together with sft_weight."""
    sft_weight: Annotated[float | None, Field(ge=0)] = None
    """The weight of the cross-entropy, in place of kd_ratio and together with kd_weight."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of both sides in the divergence, never in the cross-entropy."""
    scale_by_temperature_squared: bool | None = None
    """Multiply the divergence by the squared temperature; null does so for forward KL mixed with cross-entropy."""
    support: str = "full"
    """The outcomes that are compared at each position."""
    token_weight: str = "none"
    """How positions are weighed against each other."""
    row_cap: Annotated[float | None, Field(gt=0)] = None
    """Nats that one position's divergence counts at most, by a constant weight: against steps that a few tokens dominate."""
    reduction: Literal["token_mean", "seq_mean", "seq_sum"] = "token_mean"
    """Every target counts alike; or every response does, by the mean over its targets; or by their sum, divided by the responses."""
    alpha: float | None = None
    """Skew KL: the share of the other side in the mixture. Alpha-beta: its first exponent. DKD: weight of the target's part."""
    beta: float | None = None
    """JSD: the teacher's share in the mixture. Alpha-beta: its second exponent. DKD: weight of the part beside the target."""
    jsd_normalize: bool | None = None
    """Divide JSD by its greatest slope, so that every beta pulls alike."""
    detach_mixture: bool | None = None
    """Skew reverse KL: no gradient through the mixture."""
    forward_weight: float | None = None
    """Mixed KL: the share of the forward direction."""
    mu: float | None = None
    """Adaptive KL: the teacher's probability mass that counts as its head."""
    top_k: int | None = None
    """Outcomes kept of the teacher, by probability."""
    num_samples: int | None = None
    """Tokens drawn from the teacher at each position."""
    gap_weight: float | None = None
    """entropy_gap: how strongly the gap in entropy moves the weight."""
    min_confidence: float | None = None
    """teacher_confidence: positions where the teacher's highest probability is smaller do not count."""
    position_gain: float | None = None
    """position: how much more a late position counts."""
    share: float | None = None
    """top_share: the share of each response's positions that is kept, the largest divergence first."""
    policy: PolicyConfig | None = None
    """How the student's own tokens are credited: for support `written`, or to add a return to a divergence."""
    on_student_text: "ObjectiveConfig | None" = None
    """Another objective for the student's own text; null: this one, without its cross-entropy."""

    @model_validator(mode="before")
    @classmethod
    def _weights_stand_in_place_of_the_ratio(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if isinstance(other := given.get("on_student_text"), dict):
            # The student's own text is never learned by cross-entropy, so that a ratio which nobody named is 1 there.
            weighed = any(other.get(name) is not None for name in ("kd_weight", "sft_weight"))
            given = {**given, "on_student_text": other if weighed else {"kd_ratio": 1.0, **other}}
        named = any(given.get(name) is not None for name in ("kd_weight", "sft_weight"))
        return {"kd_ratio": None, **given} if named else given

    @model_validator(mode="after")
    def _choice_has_a_meaning(self):
        catalogue.loss_weights(self.kd_ratio, self.kd_weight, self.sft_weight)
        catalogue.check_choice(self.divergence, self.support, self.token_weight, self.given_parameters, self.temperature)
        catalogue.check_row_cap(self.row_cap, self.divergence, self.support)
        if self.policy is not None or self.support == "written":
            policy = self.policy or PolicyConfig()
            catalogue.check_policy(
                self.divergence, self.support, baseline=policy.baseline, future=policy.future, ratio=policy.ratio,
                temperature=self.temperature,
            )
        if self.divergence == "cross_entropy":
            fields = type(self).model_fields
            idle = [name for name in _OF_A_TEACHER if getattr(self, name) != fields[name].default]
            if idle:
                raise ValueError(f"{idle[0]}: cross_entropy asks no teacher, so this would have no effect; leave it out")
        return self

    @property
    def given_parameters(self) -> dict[str, Any]:
        """The parameters that the recipe sets, by name."""
        return {name: value for name in PARAMETER_KEYS if (value := getattr(self, name)) is not None}

    @property
    def parameters(self) -> dict[str, Any]:
        """The complete parameters of divergence, support and token weight, flat, defaults filled in."""
        parts = catalogue.check_choice(self.divergence, self.support, self.token_weight, self.given_parameters, self.temperature)
        return {name: value for part in parts for name, value in part.items()}

    @property
    def weights(self) -> tuple[float, float]:
        """(kd_weight, sft_weight), whichever way the recipe says them; cross-entropy alone counts once."""
        if self.divergence == "cross_entropy":
            return 0.0, 1.0
        return catalogue.loss_weights(self.kd_ratio, self.kd_weight, self.sft_weight)

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss depends on a teacher at all."""
        return self.weights[0] > 0


_OF_A_TEACHER = ("kd_weight", "sft_weight", "temperature", "scale_by_temperature_squared", "support", "token_weight")
PARAMETER_KEYS = tuple(
    name for name in ObjectiveConfig.model_fields
    if any(name in table[choice] for table in (catalogue.PARAMETERS, catalogue.SUPPORTS, catalogue.TOKEN_WEIGHTS) for choice in table)
)


class RunConfig(Config):
    """Where a run is written, from which seed, and who watches."""

    folder: Annotated[str, Field(min_length=1)]
    """Everything that the run writes goes here."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of random weights, new adapters, the order of the data and dropout."""
    trackers: list[Tracker] = Field(default_factory=list)
    """Who is shown the metrics, besides the run folder's own log."""
    merge_adapter: bool = True
    """RUN/student holds whole weights, the adapter merged into them; false leaves the adapter there with the name of its base."""


def _default_objective(validated: dict[str, Any]) -> ObjectiveConfig:
    return ObjectiveConfig() if validated.get("teacher") is not None else ObjectiveConfig(divergence="cross_entropy")


class Recipe(Config):
    """One run, from the data to the exported student."""

    student: ModelConfig
    """The model that learns."""
    teacher: TeacherConfig | None = None
    """What is learned from: a model in this process, recorded answers, a model behind HTTP, or several; without one the text alone."""
    data: DataConfig
    """The text that both read."""
    objective: ObjectiveConfig = Field(default_factory=_default_objective)
    """What is minimised; without this section forward KL mixed with cross-entropy, or cross-entropy where there is no teacher."""
    training: TrainingConfig
    """How it is minimised."""
    run: RunConfig
    """Where it is written."""
    rollouts: RolloutsConfig | None = None
    """Who writes the text that is learned from; without this section the data set does."""
    generate: GenerateConfig | None = None
    """What `potstill generate` writes, and where; a run itself does not look at it."""
    capture: CaptureConfig | None = None
    """What `potstill capture` records of the teacher, and where; a run itself does not look at it."""

    @model_validator(mode="before")
    @classmethod
    def _rows_that_a_model_writes(cls, given: Any) -> Any:
        return without_packing(given)

    @property
    def student_objective(self) -> ObjectiveConfig | None:
        """What the student's own text is learned by; None where it writes nothing that is learned."""
        return on_student_text(self.objective) if self.rollouts is not None and self.rollouts.student_writes else None

    @property
    def asks_teacher(self) -> bool:
        """Whether any loss depends on a teacher."""
        return self.objective.asks_teacher or (self.student_objective is not None and self.student_objective.asks_teacher)

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher must be at hand at all: to be asked, or to write."""
        return self.asks_teacher or (self.rollouts is not None and self.rollouts.teacher_writes)

    @model_validator(mode="after")
    def _sections_fit(self):
        objective, training = self.objective, self.training
        if self.teacher is None and objective.asks_teacher:
            raise ValueError(
                f"objective.divergence: {objective.divergence} compares with a teacher, and there is no teacher section; add "
                "teacher: {kind: local, path: ...}, or leave the objective section out to learn from the text alone"
            )
        unasked = not self.uses_teacher and self.student_objective is None
        if self.teacher is not None and objective.divergence == "cross_entropy" and unasked:
            raise ValueError(
                "objective.divergence: cross_entropy never asks the teacher; leave the teacher section out, or choose a divergence"
            )
        if training.early_stopping is not None and self.data.validation is None:
            raise ValueError("training.early_stopping: needs a validation set; set data.validation to a fraction or a file")
        if training.eval_steps is not None and self.data.validation is None:
            raise ValueError("training.eval_steps: there is nothing to evaluate on; set data.validation to a fraction or a file")
        refuse_unfit(self)
        refuse_unfit_rollouts(self)
        return self

    def resolved(self) -> dict[str, Any]:
        """The recipe as JSON values with every default filled in: what the run folder records and a resume compares."""
        values = self.model_dump(mode="json")  # null too: where a default is not null, silence would mean something else
        values["objective"] |= self.objective.parameters
        if (other := self.objective.on_student_text) is not None:
            values["objective"]["on_student_text"] |= other.parameters
        if self.rollouts is not None:
            for key in self.rollouts.idle:
                del values["rollouts"][key]
        return values
