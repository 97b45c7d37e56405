"""Rebuild the bundled emoji base: the pipeline and the CLIP model in `data/emoji-base`.

    npm pack emoji-datasource-google@16.0.0
    python -m stepfuse.scripts.emoji.build_base --package emoji-datasource-google-16.0.0.tgz \
        --work outputs/emoji-base

Four stages: autoencoder, CLIP, UNet with its text encoder, export. Each writes checkpoints into `--work`, from which
the same command resumes.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from stepfuse.data import emoji
from stepfuse.data.text_files import write_text
from stepfuse.scripts.emoji.fit import STAGES, load_average, training_facts
from stepfuse.scripts.emoji.images import read_package
from stepfuse.scripts.emoji.models import build_tokenizer, new_clip, new_denoiser, new_scheduler
from stepfuse.scripts.emoji.stages import load_vae, train_clip, train_unet, train_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the npm package, as .tgz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("vae", "clip", "unet"):
        parser.add_argument(f"--{name}_steps", type=int, default=STAGES[name].steps)
    parser.add_argument("--stages", default="vae,clip,unet,export")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    pictures = read_package(arguments.package)
    stages = arguments.stages.split(",")
    for name, train in {"vae": train_vae, "clip": train_clip, "unet": train_unet}.items():
        if name in stages:
            train(pictures, arguments.work, getattr(arguments, f"{name}_steps"), arguments.seed)
    if "export" in stages:
        export(arguments.work, arguments.package.name, arguments.seed)


def export(folder: Path, package: str, seed: int) -> None:
    """Write pipeline and CLIP in float16 to `data/emoji-base`, and the facts of their model cards to the folder."""
    tokenizer = build_tokenizer(folder)
    vae, denoiser = load_vae(folder), load_average("unet", new_denoiser(tokenizer), folder)
    latents = torch.load(folder / "latents.pt", weights_only=True)["latents"]
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 4))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        **denoiser,
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(emoji.PIPELINE)
    prefix_text_encoder(emoji.PIPELINE / "text_encoder" / "model.safetensors")
    load_average("clip", new_clip(tokenizer), folder).half().save_pretrained(emoji.CLIP)
    tokenizer.save_pretrained(emoji.CLIP)
    facts = training_facts(folder, ("vae", "clip", "unet"), package, seed)
    write_text(folder / "training.json", json.dumps(facts, indent=2) + "\n")


def prefix_text_encoder(file: Path) -> None:
    """Name the tensors of a CLIPTextModel `text_model.…`, as transformers 4 does.

    transformers 5 saves them without the prefix and reads both; transformers 4 reads these only, and otherwise returns
    random weights with a warning.
    """
    state = {key if key.startswith("text_model.") else f"text_model.{key}": v for key, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
