"""A frozen model whose parameters are spread over the ranks by FSDP2, as transformers itself does it while loading."""

import os

import torch
from accelerate import PartialState
from torch import distributed

from potstill.errors import ModelError


def sharding_arguments(path: str, quantised: bool) -> dict:
    """What `from_pretrained` must be told. Raises ModelError outside torchrun, and for quantised weights."""
    from transformers.distributed import DistributedConfig

    if quantised:
        raise ModelError(f"{path}: quantised weights cannot be sharded; leave out sharded or quantization")
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise ModelError(f"{path}: sharded: true needs several ranks; start with torchrun --nproc-per-node N -m potstill ...")
        PartialState(cpu=not torch.cuda.is_available())  # the process group that the trainer will use too
    return {"distributed_config": DistributedConfig(fsdp_size=distributed.get_world_size())}
