"""HPSv2's own model, transform and tokenizer with random weights, one image at a time as its `score` does."""

import importlib.util
import shutil
import sys
from pathlib import Path

import torch

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}


class Original:
    """Make HPS_v2_compressed.pt in a folder, with open_clip's model or the package's fork of it, and score with it.

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
        import open_clip

        # The fork reads its vocabulary when it is imported, and comes without.
        package = Path(importlib.util.find_spec("hpsv2").submodule_search_locations[0])
        vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
        missing = package / "src" / "open_clip" / vocabulary.name
        if not missing.exists():
            shutil.copyfile(vocabulary, missing)
        from hpsv2.src.open_clip import tokenizer, transform
        from hpsv2.src.open_clip.model import CLIP

        config = open_clip.get_model_config("ViT-H-14") if size == "published" else SMALL
        model = open_clip.CLIP(**config)
        preparing.fill(model)
        # Without the compressed file's float16, which would only make both round alike.
        torch.save({"state_dict": model.state_dict()}, Path(folder) / "HPS_v2_compressed.pt")
        del model
        self.model = CLIP(**config).eval()
        state = torch.load(Path(folder) / "HPS_v2_compressed.pt")["state_dict"]
        self.model.load_state_dict(state)
        self.tokenize = tokenizer.tokenize
        self.prepare = transform.image_transform(224, is_train=False, resize_longest_max=True)

    @torch.no_grad()
    def __call__(self, images, prompts):
        from PIL import Image

        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            pixels = self.prepare(Image.fromarray(image)).unsqueeze(0)
            image_features = self.model.encode_image(pixels, normalize=True)
            text_features = self.model.encode_text(self.tokenize([prompt]), normalize=True)
            scores.append((image_features @ text_features.T).item())
        return scores
