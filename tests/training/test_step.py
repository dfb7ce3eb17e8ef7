"""What an optimizer step is: the same for any cut of its rows, and equal to the textbook's.

The references share nothing with the package: probabilities of whole logits in float64, and a loop of plain torch.
"""

from dataclasses import replace

import pytest
import torch

from potstill.training.order import GlobalOrder
from small_runs import VOCABULARY, Run, examples, execute, furthest, make_distiller, make_teacher, weights

STEPS = 4


def _run(**changes) -> Run:
    return replace(Run(num_examples=29, training={"steps": STEPS, "batch_size": 8, "accumulation": 1}), **changes)


def _reference_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (teacher * (teacher.log() - student.log())).sum(-1)


def _reference_divergence(name: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    if name == "forward_kl":
        return _reference_kl(student, teacher)
    if name == "reverse_kl":
        return _reference_kl(teacher, student)
    if name == "jsd":
        mixture = 0.5 * teacher + 0.5 * student
        return 0.5 * _reference_kl(mixture, teacher) + 0.5 * _reference_kl(mixture, student)
    assert name == "tvd"
    return 0.5 * (student - teacher).abs().sum(-1)


def _reference_loss(run: Run, student, teacher, chosen) -> torch.Tensor:
    """Mean over the targets of all `chosen` examples (or over responses of their means), one example at a time, from whole logits."""
    terms, lengths = [], []
    for example in chosen:
        tokens = torch.tensor([example.tokens])
        targets = [place for place in range(1, len(example.tokens)) if example.is_target[place]]
        before = [place - 1 for place in targets]
        probs = student(input_ids=tokens).logits[0, before, :VOCABULARY].softmax(-1)
        cross_entropy = -probs.gather(1, tokens[0, targets][:, None])[:, 0].log()
        term = cross_entropy
        if run.divergence is not None:
            with torch.no_grad():
                aims = teacher(input_ids=tokens).logits[0, before, :VOCABULARY].softmax(-1)
            term = (1 - run.kd_ratio) * cross_entropy + run.kd_ratio * _reference_divergence(run.divergence, probs, aims)
        terms.append(term.sum() if run.reduction == "token_mean" else term.mean())
        lengths.append(len(targets) if run.reduction == "token_mean" else 1)
    return sum(terms) / sum(lengths)


def _chosen(run: Run, step: int):
    rows = examples(run.num_examples)
    config = run.config()
    order = GlobalOrder(
        [len(example.tokens) for example in rows], seed=run.seed, batch_size=config.batch_size, accumulation=config.accumulation
    )
    return [rows[index] for index in order.window(step).rows]


DISTANCES = [
    (divergence, kd_ratio, reduction)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd")
    for kd_ratio in (0.3, 1.0)
    for reduction in ("token_mean", "seq_mean")
] + [(None, 0.0, "token_mean"), (None, 0.0, "seq_mean")]


@pytest.mark.parametrize(("divergence", "kd_ratio", "reduction"), DISTANCES)
def test_the_gradient_of_a_step_is_that_of_whole_logits_in_float64(divergence, kd_ratio, reduction, tmp_path, monkeypatch):
    run = _run(divergence=divergence, kd_ratio=kd_ratio, reduction=reduction).but(batch_size=3, accumulation=3, steps=1, max_grad_norm=None)
    reference = make_distiller(run).student.inner.double().train()
    loss = _reference_loss(run, reference, make_teacher().causal_lm.inner.double(), _chosen(run, 0))
    loss.backward()
    distiller, found = make_distiller(run), {}

    from potstill.training.seam import DistillationTrainer

    refuse = DistillationTrainer.refuse_non_finite

    def look(trainer):
        found.update({name: parameter.grad.clone() for name, parameter in distiller.named_parameters()})
        found["loss"] = float(trainer.measures.step_total)
        refuse(trainer)

    monkeypatch.setattr(DistillationTrainer, "refuse_non_finite", look)
    execute(run, tmp_path / "run", distiller=distiller)
    assert found.pop("loss") == pytest.approx(float(loss.detach()), abs=2e-6)
    for name, parameter in reference.named_parameters():
        assert (found.pop(f"student.model.{name}").double() - parameter.grad).abs().max() < 1e-6, name
    assert not found


def _weights_after(run: Run, folder) -> dict:
    return weights(execute(run, folder)[0])


@pytest.mark.parametrize(
    "run",
    [
        _run(),
        _run(divergence="reverse_kl", kd_ratio=1.0),
        _run(divergence="jsd", kd_ratio=0.3),
        _run(divergence="adaptive_kl"),
        _run(divergence=None),
        _run(reduction="seq_mean"),
        _run(student="tied"),
        _run(student="lora_head"),
        _run(student="saved_head"),
        _run(student="tied_checkpointed"),
    ],
    ids=lambda run: f"{run.student}-{run.divergence}-{run.kd_ratio}-{run.reduction}",
)
def test_one_batch_of_8_is_4_of_2_is_8_of_1(run, tmp_path):
    whole = _weights_after(run, tmp_path / "whole")
    assert furthest(whole, weights(make_distiller(run))) > 1e-3
    assert furthest(whole, _weights_after(run.but(batch_size=2, accumulation=4), tmp_path / "accumulated")) < 1e-6
    assert furthest(whole, _weights_after(run.but(batch_size=1, accumulation=8), tmp_path / "one_by_one")) < 1e-6


@pytest.mark.parametrize("run", [_run(), _run(divergence=None, student="lora"), _run(reduction="seq_mean")], ids=["kd", "sft", "seq"])
def test_packed_is_padded(run, tmp_path, monkeypatch):
    """The same examples in each step: two and two in a row, and each in a row of its own."""
    from potstill.training import feeding

    monkeypatch.setattr(feeding, "pack", lambda lengths, max_tokens, seed: [[i, i + 1] for i in range(0, len(lengths), 2)])
    packed = replace(run, num_examples=8, packed_tokens=64).but(batch_size=2, accumulation=2, steps=3)
    padded = replace(run, num_examples=8).but(batch_size=4, accumulation=2, steps=3)
    assert furthest(_weights_after(packed, tmp_path / "packed"), _weights_after(padded, tmp_path / "padded")) < 1e-6


def test_real_packing_trains_on_every_example_once_an_epoch(tmp_path):
    from potstill.run_folder import RunFolder

    run = replace(Run(), packed_tokens=48).but(batch_size=2, accumulation=1, epochs=2)
    execute(run, tmp_path / "run")
    for epoch in range(2):
        seen = [index for line in RunFolder.read(tmp_path / "run").read_samples() if line["epoch"] == epoch for index in line["examples"]]
        assert sorted(seen) == list(range(run.num_examples))


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_run_is_a_loop_of_plain_torch(clip, tmp_path):
    """AdamW, clipping, warm-up and linear decay, written out by hand over whole logits."""
    run = _run(num_examples=24).but(batch_size=4, accumulation=2, max_grad_norm=clip, learning_rate=3e-3, warmup_steps=2, steps=6)
    distiller, _ = execute(run, tmp_path / "run")
    config, student, teacher = run.config(), make_distiller(run).student.inner.train(), make_teacher().causal_lm.inner
    decayed = [p for name, p in student.named_parameters() if "norm" not in name]
    others = [p for name, p in student.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(0.9, 0.999), eps=config.adam_epsilon,
    )  # fmt: skip
    for step in range(6):
        rate = config.learning_rate * (step / 2 if step < 2 else (6 - step) / 4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        _reference_loss(run, student, teacher, _chosen(run, step)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    by_hand = {f"student.model.{name}": parameter.detach() for name, parameter in student.named_parameters()}
    assert furthest(weights(distiller), by_hand) < 1e-6
