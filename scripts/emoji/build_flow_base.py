"""Rebuild the embedded flow base, the pipeline in `data/emoji-flow`.

    npm pack emoji-datasource-google@16.0.0
    python -m stepfuse.scripts.emoji.build_flow_base --package emoji-datasource-google-16.0.0.tgz \
        --work outputs/emoji-flow

Three stages: autoencoder, transformer with its second text encoder, export. Each writes checkpoints into `--work`, from
which the same command resumes. The first text encoder is that of the CLIP in `data/emoji-base`.
"""

import argparse
from pathlib import Path

import torch

from stepfuse.scripts.emoji.fit import STAGES
from stepfuse.scripts.emoji.flow_stages import train_flow, train_flow_vae
from stepfuse.scripts.emoji.images import read_package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the npm package, as .tgz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("flow_vae", "flow"):
        parser.add_argument(f"--{name}_steps", type=int, default=STAGES[name].steps)
    parser.add_argument("--stages", default="flow_vae,flow,export")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    pictures = read_package(arguments.package)
    for name, train in {"flow_vae": train_flow_vae, "flow": train_flow}.items():
        if name in arguments.stages.split(","):
            train(pictures, arguments.work, getattr(arguments, f"{name}_steps"), arguments.seed)


if __name__ == "__main__":
    main()
