"""Rebuild the bundled flow base, the pipeline in `data/emoji-flow`.

    npm pack emoji-datasource-google@16.0.0
    python -m stepfuse.scripts.emoji.build_flow_base --package emoji-datasource-google-16.0.0.tgz \
        --work outputs/emoji-flow

Three stages: autoencoder, transformer with its second text encoder, export. Each writes checkpoints into `--work`, from
which the same command resumes. The first text encoder is that of the CLIP in `data/emoji-base`.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPModel, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.data.text_files import read_text, write_text
from stepfuse.scripts.emoji.fit import STAGES, load_average, training_facts
from stepfuse.scripts.emoji.flow_models import T5_TOKENS, first_text_encoder, new_flow, new_flow_scheduler
from stepfuse.scripts.emoji.flow_stages import load_flow_vae, train_flow, train_flow_vae
from stepfuse.scripts.emoji.images import read_package

FLOW_STAGES = ("flow_vae", "flow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the npm package, as .tgz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    for name in FLOW_STAGES:
        parser.add_argument(f"--{name}_steps", type=int, default=STAGES[name].steps)
    parser.add_argument("--stages", default="flow_vae,flow,export")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    pictures = read_package(arguments.package)
    for name, train in {"flow_vae": train_flow_vae, "flow": train_flow}.items():
        if name in arguments.stages.split(","):
            train(pictures, arguments.work, getattr(arguments, f"{name}_steps"), arguments.seed)
    if "export" in arguments.stages.split(","):
        export(arguments.work, arguments.package.name, arguments.seed)


def export(folder: Path, package: str, seed: int) -> None:
    """Write the pipeline in float16 to `data/emoji-flow`, and the facts of its model card to the folder."""
    tokenizer = CLIPTokenizer.from_pretrained(emoji.CLIP)
    vae, model = load_flow_vae(folder), load_average("flow", new_flow(tokenizer), folder)
    latents = torch.load(folder / "flow_latents.pt", weights_only=True)["latents"]
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 4))
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        transformer=model["transformer"],
        text_encoder=first_text_encoder(CLIPModel.from_pretrained(emoji.CLIP)),
        text_encoder_2=model["text_encoder"],
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        scheduler=new_flow_scheduler(),
    )
    pipeline.to(torch.float16).save_pretrained(emoji.FLOW)
    index = emoji.FLOW / "model_index.json"
    stated = json.loads(read_text(index)) | {"max_sequence_length": T5_TOKENS}
    write_text(index, json.dumps(stated, indent=2) + "\n")
    write_text(
        folder / "training.json", json.dumps(training_facts(folder, FLOW_STAGES, package, seed), indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
