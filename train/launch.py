"""The accelerator of a run, as configured by `accelerate launch`: one process or several, with DeepSpeed or not."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from stepfuse.data.devices import allow_tf32
from stepfuse.train.config_path import ACCELERATE
from stepfuse.train.settings import TrainSettings
from stepfuse.train.trackers import check_trackers

_HELD: list[Any] = []


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """The accelerator for any launcher; several processes without a GPU communicate by gloo.

    Raises:
        ValueError: if DeepSpeed or a tracker cannot be used, or the processes are not connected.
    """
    check_trackers(settings.trackers)
    if settings.allow_tf32:
        allow_tf32()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = not torch.accelerator.is_available() and (processes > 1 or deepspeed)
    try:
        accelerator = Accelerator(
            # accelerate ignores DeepSpeed if `cpu` is set, and other launchers if it is not
            cpu=on_cpu and not deepspeed,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and deepspeed else [],
            mixed_precision=settings.mixed_precision,
            log_with=settings.trackers or None,
            project_dir=str(Path(settings.output_dir, settings.logging_dir)),  # of the trackers' logs
        )
    except ImportError as error:
        if not deepspeed:
            raise
        raise ValueError(f"DeepSpeed cannot be used: {error}; pip install 'stepfuse[deepspeed]'") from error
    if deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed and use_cpu are both configured, and accelerate then ignores DeepSpeed; set use_cpu to false: "
            "without a GPU it runs on the CPU anyway"
        )
    if accelerator.num_processes != processes:
        raise ValueError(
            f"{processes} processes were launched and each would train alone; pass --config_file "
            f"{ACCELERATE / 'cpu-2.yaml'} to the launcher, or set use_cpu to false in your configuration"
        )
    if deepspeed:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else transformers partitions text encoders and rewards (ZeRO-3)
        config = accelerator.deepspeed_plugin.deepspeed_config
        # The loop handles micro-batches: it marks the last backward pass of a step.
        config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
        config["gradient_accumulation_steps"] = accelerator.deepspeed_plugin.gradient_accumulation_steps = 1
        config["gradient_clipping"] = settings.max_grad_norm
        accelerator.gradient_state.plugin_kwargs["num_steps"] = 1
    return accelerator


def end_run(accelerator: Accelerator) -> None:
    """Wait for all processes, and end trackers and the communication of processes."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        # A thread of gloo lets go of a collective after it, for which it needs the interpreter's lock if nobody else
        # holds the collective. A process group that is deleted meanwhile holds that lock, and waits for the thread for
        # ever (torch 2.13). So the last collective is held.
        last = torch.distributed.barrier(async_op=True)
        last.wait()
        _HELD.append(last)
    else:
        accelerator.wait_for_everyone()
    accelerator.end_training()
