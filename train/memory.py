"""A run that needs more memory than there is, as one line that says what would lower it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepfuse.train.settings import TrainSettings


@contextmanager
def explained_memory(settings: TrainSettings) -> Iterator[None]:
    """An allocation that failed, on a GPU or the CPU, as the settings that lower what is needed."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(_advice(settings, error)) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(_advice(settings, error)) from error


def _advice(settings: TrainSettings, error: BaseException) -> str:
    """What was asked for, and every knob with its present value, the one that costs least first."""
    first = " ".join(str(error).split()).split(". ")[0]
    knobs = [
        f"--train_batch_size (now {settings.train_batch_size}; --gradient_accumulation_steps, "
        f"now {settings.gradient_accumulation_steps}, makes up for it)"
    ]
    if hasattr(settings, "num_candidates"):
        knobs.append(f"--num_candidates (now {settings.num_candidates}, of every image together)")
    if settings.timesteps_per_forward > 1:
        knobs.append(f"--timesteps_per_forward 1 (now {settings.timesteps_per_forward})")
    for name, better in (
        ("gradient_checkpointing", True),
        ("offload_text_encoders", True),
        ("use_8bit_adam", True),
    ):
        if getattr(settings, name) != better:
            knobs.append(f"--{name} (now off)")
    if settings.mixed_precision in (None, "no"):
        knobs.append(f"--mixed_precision bf16 (now {settings.mixed_precision or 'as the launcher says'})")
    knobs.append(f"--resolution (now {settings.resolution or 'the base’s own'})")
    knobs.append(
        "several GPUs, or configs/accelerate/zero2-offload.yaml, which keeps the optimiser in the CPU's memory"
    )
    return f"out of memory ({first}); what lowers it: {'; '.join(knobs)}"
