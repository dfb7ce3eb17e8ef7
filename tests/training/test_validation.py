"""What validation says beside the loss: agreement and entropies, against plain forwards in float64, and left out where not known."""

from dataclasses import replace

import pytest
import torch

from faultfs import without_syncing
from potstill.batch import Batch
from potstill.run_folder import RunFolder
from potstill.signals import FullOutcomes, Offers, RoutedOutcomes, TeacherSignal, TopKOutcomes
from potstill.training.distiller import Distiller
from small_runs import VOCABULARY, Run, digest, examples, execute, make_distiller, make_teacher, opened, weights

RUN = Run(num_examples=12, num_validation=40, kd_ratio=1.0).but(epochs=None, steps=12, save_steps=100, eval_steps=6, learning_rate=3e-2)
SEEN = ("eval_top1_agreement", "eval_entropy", "eval_teacher_entropy")


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def evaluated(path) -> dict[str, float]:
    return [line for line in RunFolder.read(path).read_metrics() if "eval_loss" in line][-1]


@torch.no_grad()
def plain_forwards(distiller) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each target of the validation set the float64 log-probabilities of student and teacher, one sequence at a time."""
    student, teacher = distiller.student.inner.double().eval(), make_teacher().causal_lm.inner.double().eval()
    found = []
    for example in examples(RUN.num_validation, seed=77):
        tokens = torch.tensor([list(example.tokens)])
        both = [model(tokens).logits[0, :, :VOCABULARY].log_softmax(-1) for model in (student, teacher)]
        found += [(both[0][place - 1], both[1][place - 1]) for place in range(1, tokens.shape[1]) if example.is_target[place]]
    return found


def entropy(log_probs: torch.Tensor) -> float:
    return float(-(log_probs.exp() * log_probs).sum())


@pytest.mark.parametrize("changes", [{}, {"packed_tokens": 32}, {"divergence": "jsd", "reduction": "seq_sum"}], ids=str)
def test_agreement_and_entropies_are_those_of_plain_forwards(changes, tmp_path):
    distiller, _ = execute(replace(RUN, **changes), tmp_path / "run")
    line, rows = evaluated(tmp_path / "run"), plain_forwards(distiller)
    assert line["eval_top1_agreement"] == pytest.approx(sum(int(s.argmax() == t.argmax()) for s, t in rows) / len(rows), abs=1e-9)
    assert line["eval_entropy"] == pytest.approx(sum(entropy(student) for student, _ in rows) / len(rows), abs=1e-5)
    assert line["eval_teacher_entropy"] == pytest.approx(sum(entropy(teacher) for _, teacher in rows) / len(rows), abs=1e-5)
    assert 0 < line["eval_top1_agreement"] < 1


def test_without_a_teacher_the_student_alone_is_looked_at(tmp_path):
    execute(replace(RUN, divergence=None), tmp_path / "run")
    assert [name for name in SEEN if name in evaluated(tmp_path / "run")] == ["eval_entropy"]


def test_what_validation_sees_changes_no_weight_and_no_other_number(tmp_path, monkeypatch):
    with_looks, _ = execute(RUN, tmp_path / "with")
    forward = Distiller.forward

    def without(self, *arguments, **more):
        sums = forward(self, *arguments, **more)
        return (*sums[:3], torch.full((3,), torch.nan)) if len(sums) == 4 else sums

    monkeypatch.setattr(Distiller, "forward", without)
    plain, _ = execute(RUN, tmp_path / "without")
    assert digest(weights(with_looks)) == digest(weights(plain))
    passing = {"tokens_per_second", "seconds_per_step", "peak_gib", "eval_seconds", *SEEN}
    one, two = (
        [{name: value for name, value in line.items() if name not in passing} for line in RunFolder.read(tmp_path / name).read_metrics()]
        for name in ("with", "without")
    )
    assert one == two
    assert not any(name in evaluated(tmp_path / "without") for name in SEEN)


class Recorded:
    """The live teacher's answers cut to four tokens, for all rows or for every second one."""

    name, identity, offers = "recorded", {}, Offers(frozenset({"full", "top_k"}))

    def __init__(self, every_second: bool):
        self._live, self._every_second = make_teacher(), every_second

    def score(self, batch: Batch, needs) -> TeacherSignal:
        whole = self._live.score(batch, needs).outcomes
        assert isinstance(whole, FullOutcomes)
        kept, ids = whole.head.logits(whole.hidden)[:, :VOCABULARY].log_softmax(-1).topk(4)
        cut = TopKOutcomes(ids, kept, (1 - kept.exp().sum(-1)).log())
        if not self._every_second:
            return TeacherSignal(cut)
        rows = torch.arange(len(cut))
        return TeacherSignal(RoutedOutcomes(((rows[::2], cut.rows(rows[::2])), (rows[1::2], whole.rows(rows[1::2])))))

    def close(self) -> None: ...


@pytest.mark.parametrize("every_second", [False, True])
def test_of_a_record_the_agreement_is_known_and_its_entropy_is_left_out(every_second, tmp_path):
    from potstill.objectives.distribution import DistributionMatching
    from potstill.training.trainer import train

    student = make_distiller(RUN).student
    distiller = Distiller(student, DistributionMatching(support="top_k_tail", parameters={"top_k": 4}, vocabulary_size=VOCABULARY))
    with opened(tmp_path / "run", RUN) as folder:
        train(
            distiller, Recorded(every_second), examples(12), examples(RUN.num_validation, seed=77), RUN.config(), folder, seed=3,
            pad_token=0, quiet=True,
        )  # fmt: skip
    line, rows = evaluated(tmp_path / "run"), plain_forwards(distiller)
    assert line["eval_top1_agreement"] == pytest.approx(sum(int(s.argmax() == t.argmax()) for s, t in rows) / len(rows), abs=1e-9)
    assert line["eval_entropy"] == pytest.approx(sum(entropy(student) for student, _ in rows) / len(rows), abs=1e-5)
    assert "eval_teacher_entropy" not in line
