"""What a record loses, against a reference in probability space."""

import pytest
import torch

from potstill.batch import Batch
from potstill.cache.store import CacheReader
from potstill.capture.record_loss import record_loss
from potstill.data.collation import collate
from potstill.errors import CacheError
from potstill.signals import Needs
from small_captures import VOCABULARY, example_set, make_format, make_teacher, run_capture

EXAMPLES = example_set(12)


def probabilities(batch: Batch) -> torch.Tensor:
    outcomes = make_teacher().score(batch, Needs("full")).outcomes
    return outcomes.head.logits(outcomes.hidden).double().softmax(-1)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("outcomes", ["top_k", "top_k_sampled"])
def test_the_losses_of_a_sample(outcomes, exact, tmp_path):
    run_capture(tmp_path / "cache", [EXAMPLES], format=make_format(outcomes, k=8, exact=exact))
    reader = CacheReader(str(tmp_path / "cache"))
    found = record_loss(reader, make_teacher(), list(EXAMPLES), pad_token=0)
    assert found.rows == EXAMPLES.num_targets
    coding, tail, masses = [], [], []
    for number, example in enumerate(EXAMPLES):
        for p, row in zip(probabilities(collate([[example]], pad_token=0)), range(1000), strict=False):
            record = reader.read([EXAMPLES.digest(number)])
            record = record.top if outcomes == "top_k_sampled" else record
            q = record.log_probs[row].double().exp()
            kept, q_rest = p[record.ids[row]], record.log_tail[row].double().exp()
            rest = torch.ones(VOCABULARY, dtype=torch.bool).scatter(0, record.ids[row].long(), torch.zeros(8, dtype=torch.bool))
            mass = p[rest].sum()
            coding.append(float((kept * (kept / q).log()).sum() + mass * (mass / q_rest).log()))
            shape = p[rest] / mass
            tail.append(float(mass * (shape * (shape * (VOCABULARY - 8)).log()).sum()))
            masses.append(float(mass))
    assert found.coding_mean == pytest.approx(sum(coding) / len(coding), abs=1e-6)
    assert found.coding_max == pytest.approx(max(coding), abs=1e-6)
    assert found.coding_mean < (1e-6 if exact else 1e-3)
    assert found.tail_mean == pytest.approx(sum(tail) / len(tail), abs=1e-6)
    assert found.tail_max == pytest.approx(max(tail), abs=1e-6)
    assert found.tail_mass_mean == pytest.approx(sum(masses) / len(masses), abs=1e-6)


def test_another_teacher_is_seen(tmp_path):
    from potstill.models.causal_lm import CausalLM
    from potstill.teachers.local import LocalTeacher
    from tiny import tiny_llama

    run_capture(tmp_path / "cache", [EXAMPLES])
    other = LocalTeacher(CausalLM(tiny_llama(10, width=48, layers=1), VOCABULARY))
    assert record_loss(CacheReader(str(tmp_path / "cache")), other, list(EXAMPLES), pad_token=0).coding_mean > 1e-3


def test_what_cannot_be_compared_is_refused(tmp_path):
    run_capture(tmp_path / "drawn", [EXAMPLES], format=make_format("sampled"))
    with pytest.raises(CacheError, match="sampled outcomes"):
        record_loss(CacheReader(str(tmp_path / "drawn")), make_teacher(), list(EXAMPLES), pad_token=0)
    run_capture(tmp_path / "other", [example_set(3, seed=5)])
    with pytest.raises(CacheError, match="none of the 12 sequences"):
        record_loss(CacheReader(str(tmp_path / "other")), make_teacher(), list(EXAMPLES), pad_token=0)
