"""The runs that test_ranks.py compares between one process and two ranks, in one place for both sides."""

from dataclasses import dataclass, replace

from small_runs import Run

BASE = Run(num_examples=22, num_validation=5).but(epochs=1, batch_size=2, accumulation=4, save_steps=2, eval_steps=2)
SHARDED = BASE.but(fsdp=True)
_STUDENT = replace(BASE, author="student", divergence="reverse_kl")

# Same weights as one process, whatever the ranks do. 22 rows in windows of 8: the last leaves a rank without rows.
EQUAL: dict[str, Run] = {
    "ddp": BASE,
    "ddp_within_a_micro_batch": BASE.but(batch_size=4, accumulation=1),
    "ddp_reverse_kl": replace(BASE, divergence="reverse_kl", kd_ratio=1.0),
    "ddp_jsd": replace(BASE, divergence="jsd", kd_ratio=0.3),
    "ddp_text": replace(BASE, divergence=None),
    "ddp_per_response": replace(BASE, reduction="seq_mean"),
    "ddp_packed": replace(BASE, packed_tokens=48).but(batch_size=1, accumulation=2),
    "ddp_tied_checkpointed": replace(BASE, student="tied_checkpointed"),
    "ddp_lora_dropout": replace(BASE, student="lora", dropout=0.1),
    "ddp_lora_head": replace(BASE, student="lora_head"),
    "ddp_saved_head": replace(BASE, student="saved_head"),
    "fsdp": SHARDED,
    "fsdp_jsd_tied": replace(SHARDED, student="tied", divergence="jsd", kd_ratio=1.0),
    "fsdp_text": replace(SHARDED, divergence=None),
    "fsdp_per_response": replace(SHARDED, reduction="seq_mean"),
    "fsdp_tied_checkpointed": replace(SHARDED, student="tied_checkpointed"),
    "fsdp_lora_dropout": replace(SHARDED, student="lora", dropout=0.1),
    "fsdp_lora_head": replace(SHARDED, student="lora_head"),
    "fsdp_saved_head": replace(SHARDED, student="saved_head"),
    # Text that the ranks write themselves, each its own rows.
    "ddp_student": _STUDENT,
    "ddp_rewarded": replace(_STUDENT, rewarded=True, author="mixture", share=0.7, student="lora", dropout=0.1),
    "ddp_pair_within_a_micro_batch": replace(_STUDENT, author="pair").but(batch_size=4, accumulation=1),
    "fsdp_student": _STUDENT.but(fsdp=True),
    "fsdp_teacher_mixed_tied_checkpointed": replace(_STUDENT, author="teacher_mixed", student="tied_checkpointed").but(fsdp=True),
    "fsdp_lora_head_rewarded": replace(_STUDENT, student="lora_head", rewarded=True).but(fsdp=True),
}

# In bfloat16 the two are not bit for bit the same; but what is summed and logged is float32 on both sides.
NARROW: dict[str, Run] = {
    "fsdp_bf16_lora": replace(SHARDED, student="lora_head").but(precision="bf16"),
    "fsdp_bf16_tied": replace(SHARDED, student="tied").but(precision="bf16"),
}

# Begun by one process, which stops after 2 of 6 steps; two ranks go on to 4; one process ends it.
_LONG = BASE.but(epochs=None, steps=4, scheduler="constant_with_warmup")
RESUMED: dict[str, Run] = {
    "resumed_ddp": _LONG,
    "resumed_fsdp": _LONG.but(fsdp=True),
    "resumed_lora": replace(_LONG, student="lora").but(fsdp=True),
    "resumed_mixture": replace(_LONG, author="mixture", share=0.7, divergence="reverse_kl").but(fsdp=True),
}


def legs(run: Run) -> tuple[Run, Run]:
    """What one process does before and after the two ranks."""
    alone = run.but(fsdp=False)
    return alone.but(steps=2), alone.but(steps=6)


@dataclass(frozen=True)
class Fault:
    """What goes wrong on rank 1, at which micro-batch (or before which step, or which token of what it writes)."""

    kind: str
    turn: int
    run: Run


_LOOSE = BASE.but(non_finite={"skip": 1})
FAULTS: dict[str, Fault] = {
    "loss_of_one_rank": Fault("loss", 3, BASE),
    "gradient_of_one_rank": Fault("gradient", 1, BASE),
    "gradient_of_one_rank_sharded": Fault("gradient", 1, SHARDED),
    "skipped_on_all": Fault("loss", 3, _LOOSE),
    "signal_to_one_rank": Fault("signal", 4, BASE),
    "signal_to_one_rank_sharded": Fault("signal", 4, SHARDED),
    # While the text of the second step is written: the other rank knows nothing of it until both have written.
    "signal_while_text_is_written": Fault("signal_at_token", 20, _STUDENT),
    "signal_while_text_is_written_sharded": Fault("signal_at_token", 20, _STUDENT.but(fsdp=True)),
}
