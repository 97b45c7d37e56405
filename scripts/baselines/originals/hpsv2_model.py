"""HPSv2's own model, transform and tokenizer with random weights, as its `score` uses them."""

import importlib.util
import shutil
from pathlib import Path

import torch

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}


def load(folder, size, fill):
    """Make HPS_v2_compressed.pt with open_clip's model, and load it into the package's fork of it."""
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
    written = open_clip.CLIP(**config)
    fill(written)
    # Without the compressed file's float16, which would only make both round alike.
    torch.save({"state_dict": written.state_dict()}, folder / "HPS_v2_compressed.pt")
    del written
    model = CLIP(**config).eval()
    model.load_state_dict(torch.load(folder / "HPS_v2_compressed.pt")["state_dict"])
    prepare = transform.image_transform(224, is_train=False, resize_longest_max=True)

    def score(image, prompt):
        image_features = model.encode_image(prepare(image).unsqueeze(0), normalize=True)
        text_features = model.encode_text(tokenizer.tokenize([prompt]), normalize=True)
        return (image_features @ text_features.T).item()

    return score
