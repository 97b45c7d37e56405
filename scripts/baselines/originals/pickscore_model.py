"""PickScore as its authors' README uses it, on transformers 4 with random weights, one image at a time."""

import sys
from pathlib import Path

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


class Original:
    """Make config.json and model.safetensors in a folder that has tokenizer.json, and score as the README does.

    Args:
        folder: where the published layout goes.
        example: image_reward_original.py of the reward configurations.
        size: `published` or `small`.
        threads: of torch.
    """

    def __init__(self, folder: str, example: str, size: str, threads: int) -> None:
        torch.set_num_threads(threads)
        sys.path.append(str(Path(example).parent))
        import image_reward_original
        import preparing  # beside this file, where the worker looks last

        image_reward_original.define_operators()
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

        sizes = PUBLISHED if size == "published" else SMALL
        config = CLIPConfig(
            vision_config=dict(
                **sizes["vision"], patch_size=14, image_size=224, hidden_act="gelu", projection_dim=sizes["width"]
            ),
            text_config=dict(
                **sizes["text"],
                vocab_size=49408,
                hidden_act="gelu",
                projection_dim=sizes["width"],
                bos_token_id=49406,
                eos_token_id=49407,
                pad_token_id=1,
            ),
            projection_dim=sizes["width"],
        )
        model = CLIPModel(config)
        preparing.fill(model)
        model.save_pretrained(folder, max_shard_size="50GB")
        del model
        self.model = CLIPModel.from_pretrained(folder).eval()
        tokenizer = CLIPTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"), model_max_length=77)
        self.processor = CLIPProcessor(CLIPImageProcessor(), tokenizer)

    @torch.no_grad()
    def __call__(self, images, prompts):
        from PIL import Image

        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            pixels = self.processor(
                images=Image.fromarray(image), padding=True, truncation=True, max_length=77, return_tensors="pt"
            )
            tokens = self.processor(text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
            image_embs = self.model.get_image_features(**pixels)
            image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
            text_embs = self.model.get_text_features(**tokens)
            text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
            scores.append((self.model.logit_scale.exp() * (text_embs @ image_embs.T))[0].item())
        return scores
