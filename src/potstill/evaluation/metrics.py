"""The metrics that are read off next-token distributions: their columns, and each as a formula of the columns' totals.

Torch-free: `agreement` fills the columns.
"""

from potstill.evaluation.scores import Formula, Metric, Scores

NUM_CALIBRATION_BINS = 15
_BINS = tuple(f"calibration {number}" for number in range(NUM_CALIBRATION_BINS))
OF_A_TEACHER = ("teacher_nats", "agreements", "forward_kl", "reverse_kl", "jsd", "tvd", "teacher_entropy")

COLUMNS = (
    "targets", "bytes", "nats", "teacher_nats", "agreements", "forward_kl", "reverse_kl", "jsd", "tvd",
    "entropy", "teacher_entropy", "brier", *_BINS,
)  # fmt: skip
"""Sums over a document's target tokens; of each calibration bin the sum of (correct - confidence)."""

COLUMN = {name: position for position, name in enumerate(COLUMNS)}
CALIBRATION = slice(COLUMN[_BINS[0]], COLUMN[_BINS[-1]] + 1)
NUM_COLUMNS = len(COLUMNS)


def _per_target(column: str) -> Formula:
    return Formula("ratio", (column, "targets"))


METRICS: dict[str, Metric] = {
    "cross_entropy": Metric("cross-entropy", "nats", _per_target("nats")),
    "perplexity": Metric("perplexity", "", Formula("perplexity", ("nats", "targets"))),
    "bits_per_byte": Metric("bits per byte", "bits", Formula("bits", ("nats", "bytes"))),
    "top1_agreement": Metric("top-1 agreement", "", _per_target("agreements"), True),
    "forward_kl": Metric("forward KL", "nats", _per_target("forward_kl")),
    "reverse_kl": Metric("reverse KL", "nats", _per_target("reverse_kl")),
    "jsd": Metric("Jensen-Shannon divergence", "nats", _per_target("jsd")),
    "total_variation": Metric("total variation", "", _per_target("tvd")),
    "acceptance_rate": Metric("acceptance rate", "", Formula("complement", ("tvd", "targets")), True),
    "expected_calibration_error": Metric("expected calibration error", "", Formula("calibration", ("targets", *_BINS)), counted="targets"),
    "brier_score": Metric("Brier score", "", _per_target("brier")),
    "entropy": Metric("entropy", "nats", _per_target("entropy"), None),
    "entropy_gap": Metric("entropy gap to the teacher", "nats", Formula("gap", ("entropy", "teacher_entropy", "targets")), None, "targets"),
    "teacher_perplexity": Metric("teacher's perplexity", "", Formula("perplexity", ("teacher_nats", "targets")), None),
    "teacher_bits_per_byte": Metric("teacher's bits per byte", "bits", Formula("bits", ("teacher_nats", "bytes")), None),
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
