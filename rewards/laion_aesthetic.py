"""LAION's aesthetic predictor V2 (Schuhmann 2022; used as a reward by DDPO, arXiv:2305.13301)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPVisionModelWithProjection

from stepfuse.rewards.clip import unit_vectors
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.networks import NetworkReward, load_head, load_model, read_config
from stepfuse.rewards.pixels import normalise, resize_and_crop
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.published import Published, find_files, load_state

CONFIG = Published(
    repo="openai/clip-vit-large-patch14", name="config.json", revision="32bd64288804d66eefd0ccbe215aa642df71cc41"
)
WEIGHTS = replace(
    CONFIG,
    name="model.safetensors",
    sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    size=1_710_540_580,
)
HEAD = Published(
    repo="trl-lib/ddpo-aesthetic-predictor",
    name="aesthetic-model.pth",
    revision="cf4bd10345610935a80a5d3be9a3133c50f121e4",
    size=3_714_759,
)
FILES = (CONFIG, WEIGHTS, HEAD)
VISION = ("vision_model.", "visual_projection.")  # tensors of the image encoder


class LAIONAesthetic(NetworkReward):
    """r = head(f / ‖f‖), with f the image embedding of CLIP ViT-L/14; about 1 to 10. The prompt is not used.

    See `NetworkReward`; the head is float32, and the folder holds config.json, model.safetensors (1.7 GB) and
    aesthetic-model.pth.
    """

    def __init__(self, folder: str | Path | None, device: torch.device, dtype: torch.dtype) -> None:
        config_file, weights, head = find_files(FILES, folder, "laion_aesthetic")
        config = read_config(config_file, CLIPConfig.from_dict).vision_config
        vision = {name: tensor for name, tensor in load_state(weights).items() if name.startswith(VISION)}
        self.clip = load_model(CLIPVisionModelWithProjection, config, vision, weights).to(device, dtype)
        self.head = load_head(load_state(head), head).to(device)
        self.size = config.image_size

    def score_batch(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        clip = self.clip
        pixels = normalise(resize_and_crop(images.to(clip.device), self.size)).to(clip.dtype)
        return self.head(unit_vectors(clip(pixel_values=pixels).image_embeds))[:, 0]


LAION_AESTHETIC = NamedReward(
    build=LAIONAesthetic,
    source="christophschuhmann/improved-aesthetic-predictor on openai/clip-vit-large-patch14",
    licence="Apache-2.0 (head), MIT (CLIP)",
    unit="1 to 10",
    weights=1_216_000_000,
    files=FILES,
)
