"""Hints for a run that is out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepfuse.train.settings import TrainSettings


@contextmanager
def oom_hints(settings: TrainSettings) -> Iterator[None]:
    """Turn a failed allocation, on a GPU or the CPU, into a ValueError that names settings that need less memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        first = " ".join(str(error).split()).split(". ")[0]
        reducing = "; ".join(_reducing_settings(settings))
        raise ValueError(f"out of memory ({first}); these settings reduce it: {reducing}") from error


def _reducing_settings(settings: TrainSettings) -> list[str]:
    """Every setting that helps with its present value, the one that costs least first."""
    knobs = [
        f"--train_batch_size (now {settings.train_batch_size}; --gradient_accumulation_steps, "
        f"now {settings.gradient_accumulation_steps}, makes up for it)"
    ]
    knobs += [f"--{name} (now {getattr(settings, name)}, {why})" for name, why in settings.memory_settings.items()]
    if settings.timesteps_per_forward > 1:
        knobs.append(f"--timesteps_per_forward 1 (now {settings.timesteps_per_forward})")
    switches = ("gradient_checkpointing", "offload_text_encoders", "use_8bit_adam")
    knobs += [f"--{name} (now off)" for name in switches if not getattr(settings, name)]
    if settings.mixed_precision in (None, "no"):
        knobs.append(f"--mixed_precision bf16 (now {settings.mixed_precision or 'as accelerate is configured'})")
    knobs.append(f"--resolution (now {settings.resolution or 'the default of the base model'})")
    return [*knobs, "several GPUs, or configs/accelerate/zero2-offload.yaml, which keeps the optimiser in CPU memory"]
