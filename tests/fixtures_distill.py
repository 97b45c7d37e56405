"""A set with a large gap between product and soup, which distillation can close."""

from pathlib import Path

import torch

from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule
from stepfuse.fuse.lora.factors import Factors
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.entries import Adapter
from tests.fixtures_tiny import save_stable_diffusion

SCHEDULES = {"a": EtaSchedule(eta=0.8), "b": LearnedSchedule(offsets=torch.tensor([0.1, 0.0, -0.1]), eta=1.0)}


def save_opposed_set(root: Path, *, scale: float = 3.0) -> Path:
    """Two adapters of small effect by large weights, whose soup is far from their product.

    One multiplies the queries by `scale` and divides the keys by it, and the other does the reverse: neither changes
    any attention, and halfway between them queries and keys are both (scale + 1 / scale) / 2 times what they were. On
    top of that each has a small random change of the attention's output, and a schedule of its own.
    """
    base = save_stable_diffusion(root / "base")
    network = load_pipeline(str(base)).unet
    fingerprint = base_fingerprint(network)
    for seed, (name, schedule) in enumerate(SCHEDULES.items()):
        of_queries = scale if name == "a" else 1 / scale
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for path, layer in network.named_modules():
            kind = path.rpartition("attn")[2].partition(".")[2]
            if kind not in ("to_q", "to_k", "to_out.0"):
                continue
            weight = layer.weight.detach()
            changes = {"to_q": (of_queries - 1) * weight, "to_k": (1 / of_queries - 1) * weight}
            up = changes.get(kind, 0.01 * torch.randn(weight.shape, generator=generator))
            factors[path] = Factors(down=torch.eye(weight.shape[1]), up=up, alpha=float(weight.shape[1]))
        objective = Objective(name=name, reward=f"reward_of_{name}", variance=schedule, beta=0.1)
        adapter = Adapter(
            folder=root / name,
            objective=objective,
            base={"name_or_path": str(base)} | fingerprint,
            guidance="shared",
            guidance_scale=3.0,
            num_inference_steps=3,
            license="mit",
            record={"validation": {"before": {"reward": 1.0, "deviation": 0.5, "images": 4}}},
        )
        write_adapter(adapter, factors, "unet")
    create_set(root / "set", [root / name for name in SCHEDULES])
    return root / "set"
