"""HPSv2 and v2.1 (Wu et al. 2023, arXiv:2306.09341)."""

import html
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ftfy
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import CLIPModel

from stepfuse.rewards.clip import TOKENIZER, CLIPReward, load_clip_tokenizer
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.networks import load_model
from stepfuse.rewards.open_clip_layout import from_open_clip
from stepfuse.rewards.pixels import resize_and_pad
from stepfuse.rewards.published import Published, find_files, load_state

VERSIONS = {
    version: Published(
        repo="xswu/HPSv2",
        name=f"HPS_v{version}_compressed.pt",
        revision="697403c78157020a1ae59d23f111aa58ced35b0a",
        sha256=sha256,
        size=size,
    )
    for version, sha256, size in (
        ("2", "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1", 1_972_484_501),
        ("2.1", "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837", 1_972_490_005),
    )
}


def hpsv2(
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    version: str = "2",
) -> CLIPReward:
    """r = cos(image, prompt), with a CLIP ViT-H/14 trained on human rankings; about 0.2 to 0.35.

    Images are resized as HPSv2's package does with torchvision 0.17 or newer: the longer side to 224 pixels with
    antialiasing, then padded with black. Scores of the two versions are not comparable.

    Arguments and errors are those of `NetworkReward`, and `version` is "2" or "2.1". The folder holds the checkpoint
    (2 GB) and tokenizer.json.
    """
    weights = VERSIONS[version]
    files = find_files((weights, TOKENIZER), folder, "hpsv2" if version == "2" else f"hpsv{version}")
    file = files[weights.name]
    config, state = from_open_clip(load_state(file), file)
    tokenize_clean = load_clip_tokenizer(files[TOKENIZER.name], config.text_config.max_position_embeddings)

    def tokenize(prompts: Sequence[str]) -> Int[Tensor, "batch length"]:
        return tokenize_clean([clean_prompt(prompt) for prompt in prompts])

    model = load_model(CLIPModel, config, state, file).to(device, dtype)
    return CLIPReward(model, tokenize, resize_and_pad, batch_size=batch_size)


def clean_prompt(prompt: str) -> str:
    """Clean a text as open_clip does before tokenization.

    Broken encodings are repaired, HTML entities are decoded, white space becomes single spaces, and letters lower case.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split()).lower()


def _hpsv2_1(argument: str | None, device: torch.device, dtype: torch.dtype) -> CLIPReward:
    return hpsv2(argument, device, dtype, version="2.1")


HPSV2 = NamedReward(
    build=hpsv2,
    source="arXiv:2306.09341, xswu/HPSv2",
    licence="Apache-2.0",
    unit="cosine",
    weights=3_944_000_000,
    files=(VERSIONS["2"], TOKENIZER),
)

HPSV2_1 = replace(HPSV2, build=_hpsv2_1, files=(VERSIONS["2.1"], TOKENIZER))
