"""Hints for a run that is out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from stepfuse.data.out_of_memory import first_sentence, is_out_of_memory
from stepfuse.train.config_path import ACCELERATE
from stepfuse.train.settings import TrainSettings


@contextmanager
def oom_hints(settings: TrainSettings) -> Iterator[None]:
    """Turn a failed allocation, on a GPU or the CPU, into a ValueError that names settings that need less memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reducing = "; ".join(_reducing_settings(settings))
        raise ValueError(f"out of memory ({first_sentence(error)}); these settings reduce it: {reducing}") from error


def _reducing_settings(settings: TrainSettings) -> list[str]:
    """Every setting that helps with its present value, the one that costs least first."""
    knobs = [
        f"--train_batch_size (now {settings.train_batch_size}; --gradient_accumulation_steps, "
        f"now {settings.gradient_accumulation_steps}, makes up for it)"
    ]
    knobs += [f"--{name} (now {getattr(settings, name)}, {why})" for name, why in settings.memory_settings.items()]
    knobs += _reducing_pixels(settings)
    if settings.timesteps_per_forward > 1:
        knobs.append(f"--timesteps_per_forward 1 (now {settings.timesteps_per_forward})")
    switches = ("gradient_checkpointing", "offload_text_encoders", "use_8bit_adam")
    knobs += [f"--{name} (now off)" for name in switches if not getattr(settings, name)]
    if settings.mixed_precision in (None, "no"):
        knobs.append(f"--mixed_precision bf16 (now {settings.mixed_precision or 'as accelerate is configured'})")
    knobs.append(f"--resolution (now {settings.resolution or 'the default of the base model'})")
    offload = f"--config_file {ACCELERATE / 'zero2-offload.yaml'}, which keeps the optimiser in CPU memory"
    return [*knobs, f"several GPUs, or `accelerate launch` with {offload}"]


def _reducing_pixels(settings: TrainSettings) -> list[str]:
    """Settings of decoding and of rewards, which distillation does not have."""
    knobs = []
    if settings.decode_batch_size != 1:
        knobs.append(f"--decode_batch_size 1 (now {settings.decode_batch_size or 'by free memory'})")
    if "reward" in settings.fixed:
        return knobs
    if settings.async_scoring:
        knobs.append("--no_async_scoring (now on, which keeps the images of two micro-batches more)")
    if any(each.reward_dtype == "float32" for each in settings.each):
        knobs.append("--reward_dtype bfloat16 (now float32), for rewards that are networks")
    return knobs
