"""Importing diffusers' pipelines and loading models without irrelevant log messages of diffusers and transformers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

LIBRARIES = (diffusers_logging, transformers_logging)
TRUNCATION = ("your input was truncated because", "Token indices sequence length is longer")


@contextmanager
def without_messages(*parts: str) -> Iterator[None]:
    """Suppress log records of diffusers and transformers that contain one of these texts."""

    def wanted(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in parts)

    handlers = [handler for library in LIBRARIES for handler in library.get_logger().handlers]
    for handler in handlers:
        handler.addFilter(wanted)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(wanted)


@contextmanager
def quiet_loading(*, progress: bool) -> Iterator[None]:
    """Suppress messages about options that stepfuse supports, and progress bars unless `progress`, while loading."""
    bars = [] if progress else [library for library in LIBRARIES if library.is_progress_bar_enabled()]
    # The first two are about AutoencoderTiny, used instead of AutoencoderKL; it saves a key that it does not read. The
    # third is repeated by the exception that follows it. The last is a key that stepfuse reads.
    parts = ("Expected types for vae", "were passed to AutoencoderTiny, but are not expected", "Error no file named")
    with without_messages(*parts, "{'max_sequence_length':"):
        for library in bars:
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library in bars:
                library.enable_progress_bar()


with without_messages("requires torchvision (not installed)"):  # stepfuse does not use torchvision
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents  # noqa: F401
