"""ImageReward (Xu et al. 2023, arXiv:2304.05977), implemented with the BLIP model of transformers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from stepfuse.data.devices import to_device
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.networks import NetworkReward, count_layers, load_head, load_model, read_config, rename
from stepfuse.rewards.pixels import normalise, resize_and_crop
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.published import Published, damage_errors, find_files, load_state

CHECKPOINT = Published(
    repo="THUDM/ImageReward",
    name="ImageReward.pt",
    revision="5736be03b2652728fb87788c9797b0570450ab72",
    sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
    size=1_786_880_927,
)
MED_CONFIG = replace(
    CHECKPOINT,
    name="med_config.json",
    sha256="d8b5029cc3c0124313d17009d043f0701bbe497f3721fa4ceb818720fe665326",
    size=485,
)
FILES = (CHECKPOINT, MED_CONFIG)
VOCABULARY = Path(__file__).parent / "bert-base-uncased-vocab.txt"
VOCABULARY_SIZE = 30522  # without the two tokens that BLIP adds
MAX_TOKENS = 35  # per prompt
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the reward on the data of the paper

TEXT_KEYS = (  # of med_config.json
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "layer_norm_eps", "hidden_act"),
)
# Names of BLIP's vision encoder in transformers, and of the parts of its blocks.
VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm": "post_layernorm",
}
BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


class ImageReward(NetworkReward):
    """r = (head(h) - 0.167) / 1.033, with h the [CLS] output of a text encoder that attends to the image.

    As published: prompts are truncated to 35 tokens by the tokenizer of bert-base-uncased, the [CLS] token is not
    replaced by BLIP's [ENC], and images are resized to 224 pixels and cropped.

    See `NetworkReward`; the head is float32, and the folder holds ImageReward.pt (1.8 GB) and med_config.json.
    """

    def __init__(self, folder: str | Path | None, device: torch.device, dtype: torch.dtype) -> None:
        file, med_config = find_files(FILES, folder, "image_reward")
        state = load_state(file)
        self.tokenizer = load_tokenizer()
        vision = {name.removeprefix("blip.visual_encoder."): v for name, v in state.items() if "visual_encoder" in name}
        text = {name.removeprefix("blip.text_encoder."): v for name, v in state.items() if "text_encoder" in name}
        head = {name.removeprefix("mlp."): v for name, v in state.items() if name.startswith("mlp.")}
        with damage_errors(file, "an ImageReward checkpoint in the published layout"):
            vision_config = _vision_config(vision)
        text_config = read_config(med_config, partial(_text_config, width=vision_config.hidden_size))
        self.size = vision_config.image_size
        vision = {rename(name, VISION_NAMES, BLOCK_NAMES): tensor for name, tensor in vision.items()}
        self.vision = load_model(BlipVisionModel, vision_config, vision, file).to(device, dtype)
        self.text = load_model(BlipTextModel, text_config, text, file, add_pooling_layer=False).to(device, dtype)
        self.head = load_head(head, file).to(device)
        self.device, self.dtype = device, dtype

    def score_batch(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        pixels = normalise(resize_and_crop(images.to(self.device), self.size, round_margins=True)).to(self.dtype)
        features = self.vision(pixel_values=pixels).last_hidden_state
        # Padded to the longest prompt of the batch instead of 35 tokens; masked tokens do not change the output.
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        hidden = self.text(
            input_ids=to_device(tokens.input_ids, self.device),
            attention_mask=to_device(tokens.attention_mask, self.device),
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=self.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(hidden[:, 0].float())[:, 0] - MEAN) / STD


def load_tokenizer() -> BertTokenizer:
    """Load the tokenizer of bert-base-uncased, with BLIP's two additional tokens, from the packaged vocabulary.

    `from_pretrained` is not used: without network access it silently returns a tokenizer of five tokens.
    """
    tokenizer = BertTokenizer(vocab=str(VOCABULARY), do_lower_case=True)
    assert len(tokenizer) == VOCABULARY_SIZE, len(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def _vision_config(vision: dict[str, Tensor]) -> BlipVisionConfig:
    """The configuration of the vision encoder, by the shapes of its tensors."""
    width, patch = vision["cls_token"].shape[-1], vision["patch_embed.proj.weight"].shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=count_layers(vision, "blocks."),
        num_attention_heads=width // 64,
        image_size=round((vision["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(med: dict[str, Any], width: int) -> BlipTextConfig:
    """The configuration of the text encoder, which attends to image features of this width, by med_config.json."""
    sizes = {name: med[name] for name in TEXT_KEYS}
    return BlipTextConfig(**sizes, encoder_hidden_size=width, is_decoder=True)


IMAGE_REWARD = NamedReward(
    build=ImageReward,
    source="arXiv:2304.05977, THUDM/ImageReward",
    unit="standard deviations",
    weights=1_786_000_000,
    files=FILES,
)
