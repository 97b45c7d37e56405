"""A set as small as can be, and what strangers may make of it."""

import hashlib
import json
import os
import pickle
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.config import METADATA
from stepfuse.fuse.lora.factors import Factors
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.fuse.sets.manifest import MANIFEST

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = (f"unet.{LAYER}.lora_{factor}.weight" for factor in "AB")


def small_set(base, root):
    """A set of `a` and `b`, of one layer each."""
    described = {"name_or_path": str(base)} | base_fingerprint(load_pipeline(str(base)).unet)
    for name in "ab":
        write_adapter(
            Adapter(
                folder=root / name,
                objective=Objective(name=name, reward=f"reward_of_{name}", variance=EtaSchedule(), beta=0.1),
                base=described,
                guidance="shared",
                guidance_scale=3.0,
                num_inference_steps=3,
            ),
            {LAYER: Factors(down=torch.full((2, 32), 0.1), up=torch.full((32, 2), 0.1), alpha=2.0)},
            "unet",
        )
    create_set(root / "set", [root / "a", root / "b"])
    return root / "set"


def edit(folder, /, *path, **changes):
    """Change keys of an object in the manifest."""
    values = inner = json.loads((folder / MANIFEST).read_text())
    for key in path:
        inner = inner[key]
    inner |= changes
    (folder / MANIFEST).write_text(json.dumps(values))


def insert(folder, text, *path):
    """Put text as it is where the manifest has a value."""
    edit(folder, *path[:-1], **{path[-1]: "@"})
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"@"', text))


def put_weights(folder, content, rank=2):
    """Other weights for `a`, and what the manifest says of them."""
    (folder / "a" / WEIGHTS).write_bytes(content)
    said = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "rank": rank}
    edit(folder, "adapters", 0, weights=said)
    return folder / "a" / WEIGHTS


def packed(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def tensors(shapes, dtype="F32", metadata=None):
    """A safetensors header of tensors one after another, and the size of their data."""
    header, end = {} if metadata is None else {"__metadata__": {METADATA: metadata}}, 0
    for key, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * {"F16": 2, "F32": 4}[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header, end


def enlarged(file, header, size):
    """A file that is as large as it says, with nothing behind it on the disk."""
    file.write_bytes(packed(header))
    os.truncate(file, file.stat().st_size + size)
    return file


@contextmanager
def frugal(seconds=5.0, most=2**26):
    """Within so much computing and memory: what was read would be in it."""
    if (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")  # the peak begins anew
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begun < seconds
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < most


def evil(marker):
    """A pickle that makes a file as it is read."""

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    return pickle.dumps(Evil())
