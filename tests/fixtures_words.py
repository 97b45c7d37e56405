"""A flow-matching pipeline of random weights: the model family that CONTRIBUTING gives as its example."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin, SD3Transformer2DModel

from stepfuse.fuse.backbones.registry import BACKBONES
from tests.test_documents import example


class WordDiffusionPipeline(DiffusionPipeline):
    """The pipeline of the example in CONTRIBUTING."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


@contextmanager
def word_diffusion(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Path]:
    """A saved pipeline of the family, which is registered meanwhile."""
    monkeypatch.setattr("diffusers.WordDiffusionPipeline", WordDiffusionPipeline, raising=False)
    before = dict(BACKBONES)
    example("class WordDiffusion")
    yield save_words(folder)
    BACKBONES.clear()
    BACKBONES.update(before)


def save_words(folder: Path, scheduler: SchedulerMixin | None = None) -> Path:
    """The pipeline, of 8×8 pixels, with a flow of shift 2 or another scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            pos_embed_max_size=8,
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=2.0)
    WordDiffusionPipeline(transformer, scheduler).save_pretrained(folder)
    return folder
