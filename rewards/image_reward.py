"""ImageReward (Xu et al. 2023, arXiv:2304.05977) on transformers' BLIP: no package of its own."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from stepfuse.rewards.batches import score_in_batches
from stepfuse.rewards.networks import five_layers, load_model, read_json
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
WORDS = 30522  # of that vocabulary; BLIP's two come after them
TOKENS = 35  # of a prompt at most
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the reward over its authors' data

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


class ImageReward:
    """r = (head(text encoder(prompt | vision encoder(image))_[CLS]) - 0.167) / 1.033.

    As published: prompts of 35 tokens at most, the tokenizer of bert-base-uncased, the [CLS] token in place, images
    resized to 224 pixels and cropped. Differentiable in the images.

    Args:
        folder: with ImageReward.pt and med_config.json; by default both come from the hub, 1.8 GB.
        device: where it runs.
        dtype: of the two encoders; scores are float32.
        batch_size: images a forward where no gradient is wanted.

    Raises:
        ValueError: for files that cannot be had, or are not what was published.
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
        configs = _configs(file, vision, read_json(files[MED_CONFIG.name]))
        self.size = configs[0].image_size
        self.vision = load_model(BlipVisionModel, configs[0], {_renamed(k): v for k, v in vision.items()}, file)
        self.text = load_model(BlipTextModel, configs[1], text, file, add_pooling_layer=False)
        self.head = five_layers(head, file)
        for module in (self.vision, self.text):
            module.requires_grad_(False).eval().to(device, dtype)
        self.head.to(device)
        self.device, self.dtype, self.batch_size = torch.device(device), dtype, batch_size

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        return score_in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        pixels = normalise(resize_and_crop(images.to(self.device), self.size, rounded=True)).to(self.dtype)
        features = self.vision(pixel_values=pixels).last_hidden_state
        # Padding to the longest of the batch, not to 35: what is masked changes nothing.
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        hidden = self.text(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=self.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(hidden[:, 0].float())[:, 0] - MEAN) / DEVIATION


def load_tokenizer() -> BertTokenizer:
    """That of bert-base-uncased with BLIP's two additions, from the vocabulary that lies beside this file.

    Not `from_pretrained`: without a network that returns a tokenizer of five words, and says nothing.
    """
    tokenizer = BertTokenizer(vocab=str(VOCABULARY), do_lower_case=True)
    assert len(tokenizer) == WORDS, len(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def _renamed(name: str) -> str:
    for pattern, replacement in VISION_NAMES:
        renamed, count = re.subn(rf"^{pattern}(?=\.|$)", replacement, name)
        if count:
            return renamed
    return name


def _configs(file: Path, vision: dict[str, Tensor], med: dict[str, Any]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Sizes of the vision encoder are those of its tensors; those of the text encoder are in med_config.json."""
    try:
        width = vision["cls_token"].shape[-1]
        patch = vision["patch_embed.proj.weight"].shape[-1]
        patches = vision["pos_embed"].shape[1] - 1
        mlp = vision["blocks.0.mlp.fc1.weight"].shape[0]
        layers = 1 + max(int(name.split(".")[1]) for name in vision if name.startswith("blocks."))
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: med[name] for name in (*kept, "max_position_embeddings", "layer_norm_eps", "hidden_act")}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{file} or med_config.json has no {error}; expected the published layout") from error
    try:
        return _vision(width, mlp, layers, patches, patch), BlipTextConfig(
            **sizes, encoder_hidden_size=width, is_decoder=True
        )
    except Exception as error:  # transformers' own checks raise what they like
        raise ValueError(f"med_config.json or {file}: {' '.join(str(error).split())[:160]}") from error


def _vision(width: int, mlp: int, layers: int, patches: int, patch: int) -> BlipVisionConfig:
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
