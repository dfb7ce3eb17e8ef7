"""The metrics that are read off next-token distributions: their columns, and each as a formula of the columns' totals.

Torch-free: `agreement` fills the columns.
"""

from potstill.evaluation.row_quantiles import NUM_BINS
from potstill.evaluation.scores import Formula, Metric, Scores

NUM_CALIBRATION_BINS = 15
NUM_OVERLAP = 5
"""How many of the most likely tokens of student and teacher `overlap_at_5` compares."""
_GAPS, _CONFIDENCES, _COUNTS = (
    tuple(f"{name} {number}" for number in range(NUM_CALIBRATION_BINS)) for name in ("calibration", "confidence", "confident")
)
_KL_BINS = tuple(f"forward_kl rows {number}" for number in range(NUM_BINS))
OF_A_TEACHER = (
    "teacher_nats", "agreements", "overlaps", "teacher_ranks", "forward_kl", "reverse_kl", "jsd", "tvd", "teacher_entropy", *_KL_BINS,
)  # fmt: skip

COLUMNS = (
    "targets", "bytes", "nats", "teacher_nats", "agreements", "overlaps", "teacher_ranks", "forward_kl", "reverse_kl", "jsd", "tvd",
    "entropy", "teacher_entropy", "brier", *_GAPS, *_CONFIDENCES, *_COUNTS, *_KL_BINS,
)  # fmt: skip
"""Sums over a document's target tokens. Of each calibration bin the sums of (correct - confidence), of the confidence, and of 1; of
each bin of `row_quantiles` how many rows have their forward KL in it."""

COLUMN = {name: position for position, name in enumerate(COLUMNS)}
CALIBRATION, CONFIDENCE, CONFIDENT, FORWARD_KL_ROWS = (COLUMN[names[0]] for names in (_GAPS, _CONFIDENCES, _COUNTS, _KL_BINS))
"""Where the bins begin among the columns."""
NUM_COLUMNS = len(COLUMNS)


def _per_target(column: str) -> Formula:
    return Formula("ratio", (column, "targets"))


METRICS: dict[str, Metric] = {
    "cross_entropy": Metric("cross-entropy", "nats", _per_target("nats")),
    "perplexity": Metric("perplexity", "", Formula("perplexity", ("nats", "targets"))),
    "bits_per_byte": Metric("bits per byte", "bits", Formula("bits", ("nats", "bytes"))),
    "top1_agreement": Metric("top-1 agreement", "", _per_target("agreements"), True),
    "overlap_at_5": Metric("overlap of the 5 most likely tokens", "", _per_target("overlaps"), True),
    "teacher_top1_rank": Metric("rank of the teacher's first token", "", _per_target("teacher_ranks")),
    "forward_kl": Metric("forward KL", "nats", _per_target("forward_kl")),
    "forward_kl_median": Metric("median forward KL", "nats", Formula("median", _KL_BINS), counted="targets"),
    "forward_kl_p99": Metric("99th percentile of the forward KL", "nats", Formula("p99", _KL_BINS), counted="targets"),
    "reverse_kl": Metric("reverse KL", "nats", _per_target("reverse_kl")),
    "jsd": Metric("Jensen-Shannon divergence", "nats", _per_target("jsd")),
    "total_variation": Metric("total variation", "", _per_target("tvd")),
    "acceptance_rate": Metric("acceptance rate", "", Formula("complement", ("tvd", "targets")), True),
    "expected_calibration_error": Metric("expected calibration error", "", Formula("calibration", ("targets", *_GAPS)), counted="targets"),
    "brier_score": Metric("Brier score", "", _per_target("brier")),
    "entropy": Metric("entropy", "nats", _per_target("entropy"), None),
    "entropy_gap": Metric("entropy gap to the teacher", "nats", Formula("gap", ("entropy", "teacher_entropy", "targets")), None, "targets"),
    "teacher_perplexity": Metric("teacher's perplexity", "", Formula("perplexity", ("teacher_nats", "targets")), None, compared=False),
    "teacher_bits_per_byte": Metric("teacher's bits per byte", "bits", Formula("bits", ("teacher_nats", "bytes")), None, compared=False),
}


def readable(columns: tuple[str, ...]) -> dict[str, Metric]:
    """The metrics whose columns were all counted."""
    return {name: metric for name, metric in METRICS.items() if set(metric.formula.columns) <= set(columns)}


def scores_of(items: tuple[str, ...], totals, *, has_teacher: bool, has_bytes: bool) -> Scores:
    """Totals of all COLUMNS by item, [I, NUM_COLUMNS], as a table of what was really counted."""
    absent = {*(() if has_teacher else OF_A_TEACHER), *(() if has_bytes else ("bytes",))}
    columns = tuple(name for name in COLUMNS if name not in absent)
    primary = "bits_per_byte" if has_bytes else "cross_entropy"
    return Scores(items, columns, totals[:, [COLUMN[name] for name in columns]], readable(columns), primary)


def expected_tokens_per_round(acceptance_rate: float, num_drafts: int) -> float:
    """Tokens that one round of speculative decoding yields with `num_drafts` drafted tokens (Leviathan et al. 2023, eq. 1)."""
    if acceptance_rate == 1:
        return float(num_drafts + 1)
    return (1 - acceptance_rate ** (num_drafts + 1)) / (1 - acceptance_rate)
