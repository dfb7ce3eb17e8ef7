"""From a `TrainingConfig` to the arguments of transformers.Trainer, and the traps of that seam closed.

It decides nothing about the data or the loss. Making the arguments also starts the process group, as transformers does.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from potstill.errors import ConfigError, ModelError
from potstill.training.config import TrainingConfig
from potstill.training.processes import launched_ranks, stay_on_this_machine


def layer_classes(model: nn.Module) -> list[str]:
    """The classes of the layers that FSDP gathers one at a time. Raises ModelError where the model does not name them."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._no_split_modules:
            return sorted(module._no_split_modules)
    raise ModelError("training.fsdp: the student's class does not say which of its layers may be sharded; leave fsdp out")


def _let_accelerate_shard_on_cpu() -> None:
    """On a CPU accelerate turns FSDP into DDP without a word: it reads FSDP only for the types of accelerators."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def training_arguments(
    config: TrainingConfig, folder: Path, *, model: nn.Module, seed: int, num_steps: int, steps_per_epoch: int, validates: bool,
    local_accumulation: int, quiet: bool = False,
) -> TrainingArguments:  # fmt: skip
    """The whole of what the Trainer is told. Raises ConfigError for what cannot run here."""
    world_size = launched_ranks()[1]
    on_cpu = not torch.accelerator.is_available()
    sharded: dict = {}
    accelerator_config: dict = {}
    stay_on_this_machine()
    if config.fsdp:
        if world_size == 1:
            raise ConfigError(
                "training.fsdp shards over several ranks, and this is the only one; start with torchrun --nproc-per-node N, or leave it out"
            )
        if on_cpu:
            _let_accelerate_shard_on_cpu()
            accelerator_config["use_configured_state"] = True
        sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layer_classes(model)}}
    with warnings.catch_warnings():
        # transformers tells of its own changes of defaults; ours are all set here.
        warnings.simplefilter("ignore", FutureWarning)
        args = TrainingArguments(
            output_dir=str(folder),
            run_name=folder.name,
            max_steps=num_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=local_accumulation,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.scheduler,
            lr_scheduler_kwargs=dict(config.scheduler_options) or None,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm or 0.0,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_epsilon=config.adam_epsilon,
            optim="adamw_torch_fused",
            bf16=config.precision == "bf16",
            use_cpu=on_cpu,
            seed=seed,
            full_determinism=config.deterministic,
            logging_strategy="steps",
            logging_steps=config.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=config.save_steps or steps_per_epoch,
            eval_strategy="steps" if validates else "no",
            eval_steps=config.eval_steps or steps_per_epoch,
            report_to="none",  # trackers are callbacks of ours
            disable_tqdm=quiet,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            average_tokens_across_devices=False,
            accelerator_config=accelerator_config or None,
            log_level="warning",
            **sharded,
        )
    plugin: dict[str, Any] | None = args.fsdp_plugin_args
    if plugin is not None and config.precision == "bf16":
        # Left to itself accelerate rounds what the wrapped forward returns, the loss, to bfloat16 (and with it the factor that goes
        # back through it), and adds the ranks' gradients up in bfloat16 too.
        plugin["mixed_precision_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return args
