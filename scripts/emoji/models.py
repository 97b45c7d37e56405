"""The models of the bundled emoji base and their tokenizer, before training."""

import json
from pathlib import Path

from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.fuse.diffusion.schedulers import STABLE_DIFFUSION

MAX_TOKENS = 16
LATENT_CHANNELS = 4
WIDTHS = dict(hidden_size=192, intermediate_size=768, num_attention_heads=3)  # of every transformer


def new_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=(3, 3, 1),
        latent_channels=LATENT_CHANNELS,
    )


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's format, trained on all captions: each of their words is one token."""
    path = folder / "tokenizer"
    if not path.exists():
        start, end = "<|startoftext|>", "<|endoftext|>"
        learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=end))
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        words = [word for prompt in emoji.prompts() for word in prompt.caption.split()]
        trainer = trainers.BpeTrainer(
            vocab_size=4000,
            special_tokens=[start, end],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        learner.train_from_iterator(words, trainer)
        model = json.loads(learner.to_str())["model"]
        vocabulary = dict(model["vocab"])
        for letter in pre_tokenizers.ByteLevel.alphabet():  # a lone byte may also end a word
            vocabulary.setdefault(letter + "</w>", len(vocabulary))
        merges = [tuple(merge) for merge in model["merges"]]
        CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS).save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def text_settings(tokenizer: CLIPTokenizer) -> dict:
    return dict(
        **WIDTHS,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = dict(**WIDTHS, num_hidden_layers=5, image_size=emoji.RESOLUTION, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text_settings(tokenizer), vision_config=vision, projection_dim=128))


def new_denoiser(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """The UNet and its text encoder, which one stage trains together."""
    unet = UNet2DConditionModel(
        sample_size=emoji.RESOLUTION // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer), projection_dim=128))
    return nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule; v-prediction, because plain backgrounds have low frequencies only."""
    return DDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction")
