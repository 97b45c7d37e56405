"""PickScore as its authors' README uses it, on transformers 4 with random weights."""

import torch

# Of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which PickScore was trained from.
PUBLISHED = {
    "vision": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16),
    "text": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
    "width": 1024,
}
SMALL = {
    "vision": dict(hidden_size=160, intermediate_size=320, num_hidden_layers=2, num_attention_heads=2),
    "text": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2),
    "width": 64,
}


def load(folder, size, fill):
    """Make config.json and model.safetensors in a folder that has tokenizer.json, and load them as the README does."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    sizes = PUBLISHED if size == "published" else SMALL
    both = dict(hidden_act="gelu", projection_dim=sizes["width"])
    tokens = dict(vocab_size=49408, bos_token_id=49406, eos_token_id=49407, pad_token_id=1)
    config = CLIPConfig(
        vision_config=dict(**sizes["vision"], **both, patch_size=14, image_size=224),
        text_config=dict(**sizes["text"], **both, **tokens),
        projection_dim=sizes["width"],
    )
    written = CLIPModel(config)
    fill(written)
    written.save_pretrained(folder, max_shard_size="50GB")
    del written
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=77)
    processor = CLIPProcessor(CLIPImageProcessor(), tokenizer)
    options = dict(padding=True, truncation=True, max_length=77, return_tensors="pt")

    def score(image, prompt):
        image_embs = model.get_image_features(**processor(images=image, **options))
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(**processor(text=prompt, **options))
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        return (model.logit_scale.exp() * (text_embs @ image_embs.T))[0].item()

    return score
