"""PickScore (Kirstain et al. 2023, arXiv:2305.01569)."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from stepfuse.rewards.clip import TOKENIZER, CLIPReward, load_clip_tokenizer
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.networks import load_model, read_config
from stepfuse.rewards.pixels import resize_and_crop
from stepfuse.rewards.published import Published, find_files, load_state

CONFIG = Published(
    repo="yuvalkirstain/PickScore_v1", name="config.json", revision="a4e4367c6dfa7288a00c550414478f865b875800"
)
WEIGHTS = replace(
    CONFIG,
    name="model.safetensors",
    sha256="ef31ef6fc5ff4d9bb90dd232df4e145887ba62c5a03aa2841415f8c25f18d52e",
    size=3_944_552_236,
)
FILES = (CONFIG, WEIGHTS, TOKENIZER)


def pickscore(folder: str | Path | None, device: torch.device, dtype: torch.dtype) -> CLIPReward:
    """r = exp(logit scale) · cos(image, prompt), with a CLIP ViT-H/14 trained on human preferences; about 15 to 25.

    See `NetworkReward`; the folder holds config.json, model.safetensors (3.9 GB) and tokenizer.json.
    """
    config_file, weights, tokenizer = find_files(FILES, folder, "pickscore")
    config = read_config(config_file, CLIPConfig.from_dict)
    model = load_model(CLIPModel, config, load_state(weights), weights)
    # Computed before the model is converted: rounding the logit scale to bfloat16 changes it by up to 1 %.
    factor = model.logit_scale.exp().item()
    tokenize = load_clip_tokenizer(tokenizer, config.text_config.max_position_embeddings)
    return CLIPReward(model.to(device, dtype), tokenize, resize_and_crop, factor=factor)


PICKSCORE = NamedReward(
    build=pickscore,
    source="arXiv:2305.01569, yuvalkirstain/PickScore_v1",
    licence="not stated for the weights; MIT for its code",
    unit="scaled cosine",
    weights=3_944_000_000,
    files=FILES,
)
