"""The image-reward package with random weights, as published."""

import json
import shutil

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


def load(folder, size, fill, vocabulary):
    """Make ImageReward.pt and med_config.json, and load them as the package does.

    Args:
        vocabulary: the file of bert-base-uncased.
    """
    import image_reward_original  # the shipped worker, which does the loading
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(vocabulary, folder / "vocab.txt")
    settings = dict(MED_CONFIG)
    if size == "small":
        settings |= {"num_hidden_layers": 2, "intermediate_size": 256}
        blip_pretrain.create_vit = lambda *_: (
            VisionTransformer(img_size=224, patch_size=16, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2),
            128,
        )
    weights, med_config = str(folder / "ImageReward.pt"), str(folder / "med_config.json")
    (folder / "med_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizers = blip_pretrain.init_tokenizer.__globals__["BertTokenizer"]
    published = tokenizers.from_pretrained
    tokenizers.from_pretrained = lambda name: published(str(folder))
    model = ImageReward(med_config)
    tokenizers.from_pretrained = published
    fill(model)
    torch.save(model.state_dict(), weights)
    del model
    model = image_reward_original.ImageRewardOriginal(weights, med_config=med_config, vocabulary=str(folder)).model
    return lambda image, prompt: model.score(prompt, image)
