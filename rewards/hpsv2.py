"""HPSv2 and v2.1 (Wu et al. 2023, arXiv:2306.09341)."""

import html
from dataclasses import replace
from functools import partial
from pathlib import Path

import ftfy
import torch
from transformers import CLIPModel

from stepfuse.rewards.clip import TOKENIZER, CLIPReward, load_clip_tokenizer
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.networks import load_model
from stepfuse.rewards.open_clip_layout import from_open_clip
from stepfuse.rewards.pixels import resize_and_pad
from stepfuse.rewards.published import Published, find_files, load_state

V2 = Published(
    repo="xswu/HPSv2",
    name="HPS_v2_compressed.pt",
    revision="697403c78157020a1ae59d23f111aa58ced35b0a",
    sha256="07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
    size=1_972_484_501,
)
V2_1 = replace(
    V2,
    name="HPS_v2.1_compressed.pt",
    sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    size=1_972_490_005,
)


VERSIONS = {"hpsv2": V2, "hpsv2.1": V2_1}


def hpsv2(folder: str | Path | None, device: torch.device, dtype: torch.dtype, name: str = "hpsv2") -> CLIPReward:
    """r = cos(image, prompt), with a CLIP ViT-H/14 trained on human rankings; about 0.2 to 0.35.

    Images are resized as HPSv2's package does with torchvision 0.17 or newer: the longer side to 224 pixels with
    antialiasing, then padded with black. Scores of the two versions are not comparable.

    See `NetworkReward`; the folder holds the checkpoint (2 GB) and tokenizer.json.
    """
    file, tokenizer = find_files((VERSIONS[name], TOKENIZER), folder, name)
    config, state = from_open_clip(load_state(file), file)
    tokenize = load_clip_tokenizer(tokenizer, config.text_config.max_position_embeddings, clean_prompt)
    model = load_model(CLIPModel, config, state, file).to(device, dtype)
    return CLIPReward(model, tokenize, resize_and_pad)


def clean_prompt(prompt: str) -> str:
    """Clean a text as open_clip does before tokenization.

    Broken encodings are repaired, HTML entities are decoded, white space becomes single spaces, and letters lower case.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split()).lower()


HPSV2 = NamedReward(
    build=hpsv2,
    source="arXiv:2306.09341, xswu/HPSv2",
    unit="cosine",
    weights=3_944_000_000,
    files=(V2, TOKENIZER),
)
HPSV2_1 = replace(HPSV2, build=partial(hpsv2, name="hpsv2.1"), files=(V2_1, TOKENIZER))
