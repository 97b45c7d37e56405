"""Photographs with prompts, and small reward models in the layouts that are published."""

import functools
import json
import random
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stepfuse.scripts.baselines.originals.original import fill, random_tensor

SUBJECTS = {
    "astronaut.png": "an astronaut in an orange suit",
    "chelsea.png": "a ginger cat that looks at the camera",
    "coffee.png": "a cup of coffee on a wooden table",
    "rocket.jpg": "a rocket on its launch pad",
    "hubble_deep_field.jpg": "galaxies in the night sky",
    "motorcycle_left.png": "a motorcycle in a garage",
    "retina.jpg": "the retina of an eye",
    "color.png": "a chart of colours",
}
# height, width: square, wide, tall, of odd margins, larger and smaller than what models take
SIZES = ((224, 224), (512, 512), (300, 451), (451, 300), (64, 64), (333, 200), (150, 260), (257, 225))
ENDINGS = (
    "",
    ", oil on canvas",
    ", 4K,  highly\tdetailed",
    "’s “portrait” — in a café",
    "、宇宙の写真",
    " &amp; more &lt;3",
    ", " + "very " * 2000 + "long",  # 10,000 characters
    None,  # no prompt at all
)
SMALL = ("image_reward", "pickscore", "hpsv2", "laion_aesthetic")


def photographs(count: int = 64) -> list[tuple[torch.Tensor, list[str]]]:
    """Crops of real photographs with prompts, in batches of one size: pixels in [0, 1], whole bytes."""
    folder, generator = Path(skimage.data.__file__).parent, random.Random(0)
    batches = []
    for (file, subject), (height, width) in list(zip(SUBJECTS.items(), SIZES, strict=True))[: -(-count // 8)]:
        with Image.open(folder / file) as opened:
            picture = opened.convert("RGB")
        arrays, prompts = [], []
        for ending in ENDINGS:
            side = min(picture.size) * generator.uniform(0.4, 1)
            across, down = (side, side * height / width) if height <= width else (side * width / height, side)
            left, top = generator.uniform(0, picture.width - across), generator.uniform(0, picture.height - down)
            box = (int(left), int(top), int(left + across), int(top + down))
            arrays.append(np.asarray(picture.crop(box).resize((width, height), Image.Resampling.LANCZOS)))
            prompts.append("" if ending is None else subject + ending)
        batches.append((torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255, prompts))
    return batches


def scores_of(reward, batches) -> torch.Tensor:
    return torch.cat([reward(pixels, prompts) for pixels, prompts in batches])


@functools.cache
def small_image_reward() -> dict:
    """What the image-reward package says of its own small model: its layout, and scores of `photographs`."""
    return json.loads((Path(__file__).parent / "published" / "image_reward.json").read_text())


def save_image_reward(folder: Path) -> None:
    """The small model's random weights, in the layout that the package published."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: random_tensor(name, torch.Size(shape)) for name, shape in small_image_reward()["layout"].items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(small_image_reward()["med_config"]))


def save_letters(folder: Path) -> int:
    """A tokenizer of single bytes, with CLIP's two marks last; how many tokens it has."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return len(words)


def save_clip(folder: Path, *, image_size: int = 56) -> CLIPModel:
    """A small CLIP with random weights as transformers saves it, and `save_letters`."""
    words = save_letters(folder)
    layers = dict(intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu")
    config = CLIPConfig(
        vision_config=dict(**layers, hidden_size=64, image_size=image_size, patch_size=14, projection_dim=48),
        text_config=dict(
            **layers,
            hidden_size=64,
            vocab_size=words,
            max_position_embeddings=77,
            projection_dim=48,
            bos_token_id=words - 2,
            eos_token_id=words - 1,
            pad_token_id=words - 1,
        ),
        projection_dim=48,
    )
    model = CLIPModel(config).eval()
    fill(model)
    model.save_pretrained(folder)
    return model


def save_head(file: Path, width: int) -> None:
    """The five linear layers of the aesthetic predictor, dropouts keeping their places in the names."""
    sizes = (width, 1024, 128, 64, 16, 1)
    state = {}
    for place, columns, rows in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        for kind, shape in (("weight", (rows, columns)), ("bias", (rows,))):
            name = f"layers.{place}.{kind}"
            state[name] = random_tensor(name, torch.Size(shape))
    torch.save(state, file)


def save_hpsv2(folder: Path, name: str = "HPS_v2_compressed.pt") -> None:
    """A small ViT in open_clip's layout, in float16 under `state_dict` as HPSv2 published its own."""
    words, wide, narrow, shared = save_letters(folder), 160, 128, 64
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (wide,),
        "visual.positional_embedding": (17, wide),
        "visual.proj": (wide, shared),
        "visual.conv1.weight": (wide, 3, 14, 14),
        "positional_embedding": (77, narrow),
        "text_projection": (narrow, shared),
        "token_embedding.weight": (words, narrow),
    }
    for norm, width in (("visual.ln_pre", wide), ("visual.ln_post", wide), ("ln_final", narrow)):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, width in (("visual.", wide), ("", narrow)):
        for layer in range(2):
            block = f"{tower}transformer.resblocks.{layer}."
            for part, rows, columns in (
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 2 * width, width),
                ("mlp.c_proj.", width, 2 * width),
            ):
                shapes |= {f"{block}{part}weight": (rows, columns), f"{block}{part}bias": (rows,)}
            for part in ("ln_1.", "ln_2."):
                shapes |= {f"{block}{part}weight": (width,), f"{block}{part}bias": (width,)}
    state = {key: random_tensor(key, torch.Size(shape)).half() for key, shape in shapes.items()}
    torch.save({"state_dict": state | {"logit_scale": torch.tensor(2.6592).half()}}, folder / name)


def save_small_networks(root: Path) -> None:
    """The networks of `SMALL`, of random weights, each in a folder of its name."""
    for name in SMALL:
        (root / name).mkdir()
    save_image_reward(root / "image_reward")
    save_clip(root / "pickscore")
    save_hpsv2(root / "hpsv2")
    save_clip(root / "laion_aesthetic")
    save_head(root / "laion_aesthetic" / "aesthetic-model.pth", 48)
