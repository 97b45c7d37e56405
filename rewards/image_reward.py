"""ImageReward (Xu et al. 2023, arXiv:2304.05977), implemented with the BLIP model of transformers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.networks import NetworkReward, load_head, load_model, read_published_json
from stepfuse.rewards.pixels import normalise, resize_and_crop
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.published import Published, find_files, load_state

REVISION = "5736be03b2652728fb87788c9797b0570450ab72"
CHECKPOINT = Published(
    repo="THUDM/ImageReward",
    name="ImageReward.pt",
    revision=REVISION,
    sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
    size=1_786_880_927,
)
MED_CONFIG = Published(
    repo="THUDM/ImageReward",
    name="med_config.json",
    revision=REVISION,
    sha256="d8b5029cc3c0124313d17009d043f0701bbe497f3721fa4ceb818720fe665326",
    size=485,
)
VOCABULARY = Path(__file__).parent / "bert-base-uncased-vocab.txt"
VOCABULARY_SIZE = 30522  # without the two tokens that BLIP adds
MAX_TOKENS = 35  # per prompt
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the reward on the data of the paper

VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.norm([12])", r"encoder.layers.\1.layer_norm\2"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    (r"norm", "post_layernorm"),
)


class ImageReward(NetworkReward):
    """r = (head(h) - 0.167) / 1.033, with h the [CLS] output of a text encoder that attends to the image.

    As published: prompts are truncated to 35 tokens by the tokenizer of bert-base-uncased, the [CLS] token is not
    replaced by BLIP's [ENC], and images are resized to 224 pixels and cropped.

    Arguments and errors are those of `NetworkReward`; `dtype` is the data type of the two encoders, and the head is
    float32. The folder holds ImageReward.pt (1.8 GB) and med_config.json.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        files = find_files((CHECKPOINT, MED_CONFIG), folder, "image_reward")
        file = files[CHECKPOINT.name]
        state = load_state(file)
        self.tokenizer = load_tokenizer()
        vision = {name.removeprefix("blip.visual_encoder."): v for name, v in state.items() if "visual_encoder" in name}
        text = {name.removeprefix("blip.text_encoder."): v for name, v in state.items() if "text_encoder" in name}
        head = {name.removeprefix("mlp."): v for name, v in state.items() if name.startswith("mlp.")}
        vision_config, text_config = _configs(file, vision, read_published_json(files[MED_CONFIG.name]))
        self.size = vision_config.image_size
        self.vision = load_model(BlipVisionModel, vision_config, {_rename(k): v for k, v in vision.items()}, file)
        self.text = load_model(BlipTextModel, text_config, text, file, add_pooling_layer=False)
        self.head = load_head(head, file)
        for module in (self.vision, self.text):
            module.requires_grad_(False).eval().to(device, dtype)
        self.head.to(device)
        self.device, self.dtype, self.batch_size = torch.device(device), dtype, batch_size

    def score_batch(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        pixels = normalise(resize_and_crop(images.to(self.device), self.size, round_margins=True)).to(self.dtype)
        features = self.vision(pixel_values=pixels).last_hidden_state
        # Padded to the longest prompt of the batch instead of 35 tokens; masked tokens do not change the output.
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        hidden = self.text(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
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


def _rename(name: str) -> str:
    """The name in transformers of a tensor of the vision encoder."""
    for pattern, replacement in VISION_NAMES:
        renamed, count = re.subn(rf"^{pattern}(?=\.|$)", replacement, name)
        if count:
            return renamed
    return name


def _configs(file: Path, vision: dict[str, Tensor], med: dict[str, Any]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Configure the vision encoder by the shapes of its tensors, and the text encoder by med_config.json."""
    try:
        width, patch = vision["cls_token"].shape[-1], vision["patch_embed.proj.weight"].shape[-1]
        vision_sizes = dict(
            hidden_size=width,
            intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=1 + max(int(name.split(".")[1]) for name in vision if name.startswith("blocks.")),
            num_attention_heads=width // 64,
            image_size=round((vision["pos_embed"].shape[1] - 1) ** 0.5) * patch,
            patch_size=patch,
        )
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        text_sizes = {name: med[name] for name in (*keys, "max_position_embeddings", "layer_norm_eps", "hidden_act")}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{file} or med_config.json has no {error}; expected the published layout") from error
    try:
        vision_config = BlipVisionConfig(**vision_sizes, hidden_act="gelu", layer_norm_eps=1e-6)
        return vision_config, BlipTextConfig(**text_sizes, encoder_hidden_size=width, is_decoder=True)
    except Exception as error:  # transformers raises many types of exception
        raise ValueError(
            f"med_config.json or {file} holds an invalid size: {' '.join(str(error).split())[:160]}"
        ) from error


IMAGE_REWARD = NamedReward(
    build=ImageReward,
    source="arXiv:2304.05977, THUDM/ImageReward",
    licence="Apache-2.0",
    unit="standard deviations",
    weights=1_786_000_000,
    files=(CHECKPOINT, MED_CONFIG),
)
