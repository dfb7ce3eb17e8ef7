"""Learning from the tokens that the student drew itself: policy gradients of the reverse KL, beside a divergence in closed form or not.

Two looks at the rows: the first, without a gradient, finds what each token is to be credited with; the second learns. It knows no
generator: what a token was drawn from comes with the batch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from potstill.batch import Batch
from potstill.errors import ConfigError, IncompatibleError
from potstill.head import Head
from potstill.objectives.catalogue import SEQUENCE_WEIGHTS, Value, check_choice, check_policy, check_row_cap
from potstill.objectives.credit import credited, following, importance
from potstill.objectives.distribution import needs_of
from potstill.objectives.execution import Execution
from potstill.objectives.fused import FusedLoss, run_plan
from potstill.objectives.passes import weighted_sum
from potstill.objectives.plan import Plan, likelihood_plan, make_plan
from potstill.objectives.reduction import check_reduction, count, row_weights
from potstill.objectives.targets import teacher_log_probs
from potstill.objectives.weights import sequence_weight
from potstill.signals import Needs, TeacherOutcomes, TeacherSignal

# Nats of a log-ratio beyond which the estimate of the divergence, a value for the log alone, grows no more: e^60 can still be summed.
_MOST = 60.0


@dataclass(frozen=True)
class _Credit:
    """What the first look found, by row: the coefficient of -log q(y), the weight of the divergence, and what is logged."""

    coefficients: Tensor
    divergence_weights: Tensor
    importance: Tensor  # of an estimate: where it is small it stays small
    log_ratio: Tensor | None


class PolicyGradient(nn.Module):
    """sum over targets of w_t D_t + c_t (-log q(y_t)), both weights constants.

    D_t is the divergence over the support in closed form; support `written` has none. With l = log p(y) - log q(y) of the token that was
    drawn, c_t = rho_t (l_t [written] + KL(q || p)_t [baseline kl] + what follows [future] + reward_weight reward_t), and rho_t is the
    importance ratio to what the token was drawn from (`batch.log_probs`) under today's student, treated as `ratio` says; w_t = rho_t.

    The total's gradient is that of this sum. Its value is the divergence's, which the sum's is not: D_t where there is one, else the
    estimate rho_t (e^l - 1 - l) of the reverse KL (k3), which is never differentiated. `kd_weight` multiplies everything but the reward.
    """

    def __init__(
        self,
        *,
        divergence: str = "reverse_kl",
        parameters: dict[str, Value] | None = None,
        support: str = "full",
        temperature: float = 1.0,
        token_weight: str = "none",
        row_cap: float | None = None,
        kd_weight: float = 1.0,
        reduction: str = "token_mean",
        baseline: str = "none",
        future: str = "none",
        discount: float = 1.0,
        ratio: str = "truncate",
        ratio_limit: float = 2.0,
        reward_weight: float = 0.0,
        vocabulary_size: int | None = None,
        execution: Execution | None = None,
    ):
        super().__init__()
        weight_parameters = check_choice(divergence, support, token_weight, parameters)[2]
        check_row_cap(row_cap, divergence, support)
        check_policy(divergence, support, baseline=baseline, future=future, ratio=ratio, temperature=temperature)
        if not 0 < discount <= 1 or not ratio_limit > 1:
            raise ConfigError(
                f"objective.policy: discount lies in (0, 1] and ratio_limit above 1; found discount {discount}, ratio_limit {ratio_limit}"
            )
        self.written = support == "written"
        self.credits = self.written or future != "none" or reward_weight != 0
        self.plan = likelihood_plan() if self.written else make_plan(
            divergence, parameters, kd_weight=kd_weight, sft_weight=float(self.credits), support=support, token_weight=token_weight,
            row_cap=row_cap,
        )  # fmt: skip
        self.look = self._plan_of_first_look(baseline)
        self.needs = Needs("full") if baseline == "kl" else needs_of(support, parameters, token_weight=token_weight)
        self.token_weight, self.weight_parameters = token_weight, weight_parameters
        self.kd_weight, self.reward_weight = kd_weight, reward_weight
        self.baseline, self.future, self.discount = baseline, future, discount
        self.ratio, self.ratio_limit = ratio, ratio_limit
        self.reduction = check_reduction(reduction)
        self.vocabulary_size = vocabulary_size
        self.execution = execution or Execution()

    def _plan_of_first_look(self, baseline: str) -> Plan:
        """Both sides where a divergence must be known before anything is learned, else the student alone."""
        if baseline == "kl":
            # With the weight `position` a look tells the log-ratio of the targets too, so that the teacher's head is gone through once.
            return make_plan("reverse_kl", None, kd_ratio=1.0, token_weight="position")
        return self.plan if self.plan.token_weight in SEQUENCE_WEIGHTS else likelihood_plan()

    def count(self, batch: Batch) -> int:
        """What the total of the whole optimizer step is divided by, summed over its micro-batches and ranks."""
        return count(self.reduction, batch)

    def total(
        self, student_rows: Tensor, student_head: Head, signal: TeacherSignal | None, batch: Batch, *, details: bool = False
    ) -> FusedLoss:
        """`student_rows [N, D]` and `signal` answer the rows of `batch.target_rows()`, in their order.

        Raises IncompatibleError where text is to be credited whose log-probabilities or rewards the batch does not hold.
        """
        if signal is None or signal.outcomes is None:
            raise IncompatibleError(
                f"the policy gradient needs the teacher's {self.needs.outcomes} outcomes; found none; score the batch first"
            )
        outcomes, targets = signal.outcomes, batch.target_rows()[1]
        credit = self._credit(student_rows, student_head, outcomes, batch) if len(targets) else None
        weights = row_weights(self.reduction, batch)
        # training=False is no dropout on a LoRA of the head, as in the first look and in the writing; gradients there are all the same.
        loss = run_plan(
            self.plan, student_rows, student_head, None if self.written else outcomes, targets, vocabulary_size=self.vocabulary_size,
            row_weights=weights, divergence_weights=None if credit is None else credit.divergence_weights,
            text_weights=None if credit is None else credit.coefficients, training=False, details=details,
            execution=self.execution,
        )
        return loss if credit is None else self._valued(loss, credit, weights)

    def _valued(self, loss: FusedLoss, credit: _Credit, row_weights: Tensor | None) -> FusedLoss:
        """The loss with the divergence's value in place of the credited sum's."""
        by_row = {**loss.by_row, "importance": credit.importance}
        weights = torch.ones_like(credit.importance) if row_weights is None else row_weights.to(credit.importance)
        if credit.log_ratio is not None:
            by_row["log_ratio"] = credit.log_ratio
        if self.written:
            assert credit.log_ratio is not None
            # A token that another drew can be all but impossible for the student: its credit is then 0, and must not be logged as infinite.
            by_row["divergence"] = credit.importance * (credit.log_ratio.clamp_max(_MOST).expm1() - credit.log_ratio)
            value = (weights * by_row["divergence"]).sum()
            loss = replace(loss, divergence=value)
        else:
            value = weighted_sum(weights * by_row["token_weight"], by_row["divergence"])
        total = (self.kd_weight * value).to(loss.total.dtype) + (loss.total - loss.total.detach())
        return replace(loss, total=total, by_row=by_row)

    @torch.no_grad()
    def _credit(self, student_rows: Tensor, student_head: Head, outcomes: TeacherOutcomes, batch: Batch) -> _Credit:
        """The first look, and what follows from it."""
        targets, responses = batch.target_rows()[1], batch.target_responses()
        look = run_plan(
            self.look, student_rows, student_head, outcomes if self.look.has_teacher else None, targets,
            vocabulary_size=self.vocabulary_size, training=False, execution=self.execution,
        ).by_row
        own = -look["cross_entropy"]
        log_ratio = None
        if self.written or self.future != "none":
            log_ratio = look.get("disagreement")
            if log_ratio is None:
                log_ratio = teacher_log_probs(
                    outcomes, targets, student_head, vocabulary_size=self.vocabulary_size, execution=self.execution
                ).to(own) - own
        of_position = torch.ones_like(own)
        if self.token_weight in SEQUENCE_WEIGHTS:
            disagreement = look.get("disagreement", log_ratio)
            measure = look.get("divergence", disagreement)
            assert measure is not None
            of_position = sequence_weight(
                self.token_weight, self.weight_parameters, responses, measure, measure if disagreement is None else disagreement
            )
        advantage = torch.zeros_like(own)
        if self.written:
            assert log_ratio is not None
            advantage = of_position * (log_ratio + look["divergence"] if self.baseline == "kl" else log_ratio)
        if self.future != "none":
            assert log_ratio is not None
            advantage = advantage + following(self.future, self.discount, log_ratio, responses)
        advantage = self.kd_weight * advantage + self._rewards(batch, own)
        from_drawn = self._from_drawn(batch, own)
        weights = importance(self.ratio, self.ratio_limit, from_drawn)
        return _Credit(
            coefficients=credited(self.ratio, self.ratio_limit, from_drawn, advantage),
            divergence_weights=weights * of_position, log_ratio=log_ratio,
            importance=importance("truncate" if self.ratio == "clip" else self.ratio, self.ratio_limit, from_drawn),
        )

    def _from_drawn(self, batch: Batch, own: Tensor) -> Tensor:
        """log q - log mu of each target: 0 where nothing was drawn, which is for looking alone."""
        if batch.log_probs is not None:
            return own - batch.at_targets(batch.log_probs).to(own)
        if self.training and self.credits:
            raise IncompatibleError(
                "objective: tokens are credited that the student draws itself, and this text comes without the log-probabilities that it "
                "was drawn with; learn from a data set by a divergence alone, or set rollouts.author to who draws it"
            )
        return torch.zeros_like(own)

    def _rewards(self, batch: Batch, own: Tensor) -> Tensor:
        if self.reward_weight == 0 or (batch.rewards is None and not self.training):
            return torch.zeros_like(own)
        if batch.rewards is None:
            raise IncompatibleError("rollouts.reward: this text has no rewards; the author of a text sets Example.reward, or leave it out")
        return self.reward_weight * batch.at_targets(batch.rewards).to(own)
