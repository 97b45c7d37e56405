"""The image-reward package with random weights, scored one image at a time as published."""

import json
import shutil
import sys
from pathlib import Path

import torch

# What its published med_config.json says.
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


class Original:
    """Make ImageReward.pt and med_config.json in a folder, load them as the package does, and score with it.

    Args:
        folder: where the published layout goes.
        vocabulary: the file of bert-base-uncased.
        example: image_reward_original.py of the reward configurations, which does the loading.
        size: `published`, or `small`: two layers in each encoder.
        threads: of torch.
    """

    def __init__(self, folder: str, vocabulary: str, example: str, size: str, threads: int) -> None:
        torch.set_num_threads(threads)
        sys.path.append(str(Path(example).parent))
        import image_reward_original  # the shipped worker, which does the loading
        import preparing  # it lies beside this file, where the worker looks last

        image_reward_original.define_operators()
        from ImageReward.ImageReward import ImageReward
        from ImageReward.models.BLIP import blip_pretrain
        from ImageReward.models.BLIP.vit import VisionTransformer

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(vocabulary, target / "vocab.txt")
        med_config = dict(MED_CONFIG)
        if size == "small":
            med_config |= {"num_hidden_layers": 2, "intermediate_size": 256}
            blip_pretrain.create_vit = lambda *_: (
                VisionTransformer(img_size=224, patch_size=16, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2),
                128,
            )
        (target / "med_config.json").write_text(json.dumps(med_config), encoding="utf-8")
        tokenizers = blip_pretrain.init_tokenizer.__globals__["BertTokenizer"]
        published = tokenizers.from_pretrained
        tokenizers.from_pretrained = lambda name: published(folder)
        model = ImageReward(str(target / "med_config.json"))
        tokenizers.from_pretrained = published
        preparing.fill(model)
        torch.save(model.state_dict(), target / "ImageReward.pt")
        del model
        self.score = image_reward_original.ImageRewardOriginal(
            str(target / "ImageReward.pt"), med_config=str(target / "med_config.json"), vocabulary=folder
        )

    def __call__(self, images, prompts):
        return self.score(images, prompts)
