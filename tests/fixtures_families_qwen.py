"""Tiny Qwen-Image and Z-Image: text encoders of the Qwen family with random weights, and a tokenizer for them."""

import json
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen3Config, Qwen3Model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Of one message of a user, with thinking enabled, Qwen3's own template makes the same.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen-Image's template and prompts of tests: each of these words becomes one token, as in the real vocabulary.
CORPUS = [
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:\nuser\nassistant\n",
    "a red apple, a cat on a blue background, a fox, two keys",
]
TEXT: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    bos_token_id=None,
    eos_token_id=2,
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE, trained on the corpus; other words are several tokens."""
    untrained = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    untrained.train_from_iterator([*CORPUS, *CORPUS], trainer)
    model = json.loads(untrained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=SPECIAL[1:],
        chat_template=CHAT,
    )


def qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=2)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            # as Qwen-Image's, whose shift_terminal is 0.02: a step that ends so close to 0 decides all that is learnt
            use_dynamic_shifting=True,
            max_image_seq_len=8192,
            max_shift=0.9,
            shift_terminal=0.2,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 2.0, 1.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope}, vision_config=vision
            )
        ),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def z_image(vae: AutoencoderKL) -> ZImagePipeline:
    """On an autoencoder of four channels."""
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(Qwen3Config(**TEXT, vocab_size=len(tokenizer), head_dim=16)),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
        ),
    )
