"""The diffusers pipeline as a place to load from: base models, prompts to embeddings, latents to pixels."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jaxtyping import Float
from torch import Tensor

from stepfuse.data import emoji
from stepfuse.fuse.path import NoisePath

EMBEDDED = {"emoji": emoji.PIPELINE}


def load_pipeline(
    name_or_path: str, *, dtype: torch.dtype = torch.float32, safe: bool = False, **options: Any
) -> DiffusionPipeline:
    """A Stable Diffusion (1.x, 2.x or XL) pipeline from the hub, a folder, or `emoji`, the embedded base.

    No safety checker is loaded; rewards and samplers here want every image.

    Args:
        name_or_path: as for `DiffusionPipeline.from_pretrained`, or `emoji`.
        dtype: of every component.
        safe: take weights in safetensors only, as bases that somebody else's set names should be.
        options: passed on, `revision` and `variant` for instance.

    Raises:
        ValueError: for a pipeline that is neither Stable Diffusion nor Stable Diffusion XL, or a
            folder without one.
    """
    path = str(EMBEDDED.get(name_or_path, name_or_path))
    try:
        index = DiffusionPipeline.load_config(path, **{k: v for k, v in options.items() if k == "revision"})
    except OSError as error:
        raise ValueError(
            f"no diffusers pipeline at {name_or_path!r}: expected a hub id, a folder with model_index.json, "
            f"or one of {', '.join(EMBEDDED)} ({str(error).splitlines()[0]})"
        ) from error
    options = {k: v for k, v in options.items() if v is not None}
    if safe:
        options |= {"use_safetensors": True}
    if "safety_checker" in index:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype, **options)
    except OSError as error:
        if not safe:
            raise
        raise ValueError(f"{name_or_path!r} cannot be loaded from safetensors: {str(error).splitlines()[0]}") from error
    if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise ValueError(
            f"{name_or_path!r} is a {type(pipeline).__name__}; expected StableDiffusionPipeline or "
            "StableDiffusionXLPipeline"
        )
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipeline


def quiet_libraries() -> None:
    """For programs: diffusers and transformers report errors only, and load without progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the UNet is told besides the latent: a row a sample, positive and negative.

    Attributes:
        positive: prompt embeddings.
        negative: embeddings of the negative prompts.
        added: SDXL's pooled embeddings and size ids, positive and negative; empty elsewhere.
    """

    positive: Float[Tensor, "batch tokens width"]
    negative: Float[Tensor, "batch tokens width"]
    added: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        return Conditioning(
            positive=self.positive[rows],
            negative=self.negative[rows],
            added={k: (p[rows], n[rows]) for k, (p, n) in self.added.items()},
        )

    def to(self, device: torch.device) -> "Conditioning":
        return Conditioning(
            positive=self.positive.to(device),
            negative=self.negative.to(device),
            added={k: (p.to(device), n.to(device)) for k, (p, n) in self.added.items()},
        )

    def repeat(self, count: int) -> "Conditioning":
        """Every row `count` times, in place: a a b b."""
        return self[torch.arange(len(self.positive)).repeat_interleave(count)]

    def inputs(self, kinds: str) -> dict[str, Any]:
        """UNet arguments for `+` (positive), `-` (negative), or `-+` (both, stacked in that order)."""
        pick = {"+": 0, "-": 1}
        states = (self.positive, self.negative)
        inputs: dict[str, Any] = {"encoder_hidden_states": torch.cat([states[pick[k]] for k in kinds])}
        if self.added:
            inputs["added_cond_kwargs"] = {
                name: torch.cat([pair[pick[k]] for k in kinds]) for name, pair in self.added.items()
            }
        return inputs


def stack_inputs(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """UNet arguments of several batches as those of one."""
    return {
        name: stack_inputs([part[name] for part in parts])
        if isinstance(value, Mapping)
        else torch.cat([part[name] for part in parts])
        for name, value in parts[0].items()
    }


def input_rows(inputs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """UNet arguments of some rows of a batch."""
    return {
        name: input_rows(value, rows) if isinstance(value, Mapping) else value[rows] for name, value in inputs.items()
    }


def execution_device(pipeline: DiffusionPipeline) -> torch.device:
    """Where the pipeline computes; with offloading its modules lie elsewhere meanwhile."""
    return pipeline._execution_device


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    negative_prompts: list[str],
    *,
    height: int | None = None,
    width: int | None = None,
    device: torch.device | None = None,
) -> Conditioning:
    """Embed prompts as the pipeline itself does; height and width matter to SDXL only.

    Args:
        device: where its text encoders are; by default where it computes.
    """
    arguments = dict(
        prompt=prompts,
        device=device or execution_device(pipeline),
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negative_prompts,
    )
    if not isinstance(pipeline, StableDiffusionXLPipeline):
        positive, negative = pipeline.encode_prompt(**arguments)
        return Conditioning(positive=positive, negative=negative)
    positive, negative, pooled, negative_pooled = pipeline.encode_prompt(**arguments)
    height, width = image_size(pipeline, height, width)
    projection = pipeline.text_encoder_2.config.projection_dim
    ids = pipeline._get_add_time_ids(
        (height, width), (0, 0), (height, width), dtype=positive.dtype, text_encoder_projection_dim=projection
    ).to(positive.device)
    ids = ids.expand(len(prompts), -1)
    return Conditioning(
        positive=positive,
        negative=negative,
        added={"text_embeds": (pooled, negative_pooled), "time_ids": (ids, ids)},
    )


def image_size(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default the UNet's own.

    Raises:
        ValueError: for a size the pipeline cannot draw.
    """
    factor = pipeline.vae_scale_factor
    native = pipeline.unet.config.sample_size
    native_height, native_width = native if isinstance(native, list | tuple) else (native, native)
    size = (
        native_height * factor if height is None else height,
        native_width * factor if width is None else width,
    )
    step = factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    for name, pixels in zip(("height", "width"), size, strict=True):
        if pixels <= 0 or pixels % step:
            raise ValueError(f"{name} is {pixels}; expected a positive multiple of {step} for this model")
    return size


def latent_shape(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Channels, height and width of one latent."""
    pixels = image_size(pipeline, height, width)
    factor = pipeline.vae_scale_factor
    return (pipeline.unet.config.in_channels, pixels[0] // factor, pixels[1] // factor)


def decode_latents(
    pipeline: DiffusionPipeline, latents: Float[Tensor, "batch channels h w"]
) -> Float[Tensor, "batch 3 height width"]:
    """Latents → float32 pixels in [0, 1], differentiable."""
    vae = pipeline.vae
    if getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16:
        vae.to(torch.float32)  # SDXL's autoencoder overflows in half precision
    pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def base_fingerprint(unet: torch.nn.Module) -> dict[str, Any]:
    """What tells one base from another: a hash of names and shapes, and 64 weights to compare within bf16.

    The weights are compared, not hashed, so that one base in float32, float16 and bfloat16 is one base.
    """
    state = {
        name.replace(".base_layer.", "."): value for name, value in unet.state_dict().items() if ".lora_" not in name
    }
    names = sorted(state)
    shapes = "\n".join(f"{name} {list(state[name].shape)}" for name in names)
    chosen = [names[i * (len(names) - 1) // 63] for i in range(64)]
    probe = [state[name].flatten()[state[name].numel() // 2].item() for name in chosen]
    return {"architecture": hashlib.sha256(shapes.encode()).hexdigest(), "probe": probe}


def describe_base(
    pipeline: DiffusionPipeline, name_or_path: str, revision: str | None = None, *, hashed: bool = True
) -> dict[str, Any]:
    """What an adapter says of the base it belongs to.

    Its fingerprint tells bases apart whatever their precision. `weights_sha256` is of the UNet as it was loaded: its
    tensors' names and bytes, in the order of names; in another precision it is another. It is left out unless `hashed`,
    for it takes seconds of large ones.
    """
    path = NoisePath.from_scheduler(pipeline.scheduler)
    return {
        "name_or_path": name_or_path,
        "revision": cached_commit(name_or_path, revision) or revision,
        "weights_sha256": weights_hash(pipeline.unet) if hashed else None,
        "noise_path": path.describe(),
    } | base_fingerprint(pipeline.unet)


def cached_commit(repository: str, revision: str | None) -> str | None:
    """The commit that a hub id was loaded at, if it is one and is in the hub's cache."""
    try:
        index = try_to_load_from_cache(repository, "model_index.json", revision=revision)
    except HFValidationError:  # a folder, or a name of ours
        return None
    return Path(index).parent.name if isinstance(index, str) else None


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of a model without LoRAs."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_path(base: Mapping[str, Any], pipeline: DiffusionPipeline) -> None:
    """See that a pipeline's noise path is the one an adapter was trained on, where that is recorded.

    Raises:
        ValueError: naming what is otherwise.
    """
    own = NoisePath.from_scheduler(pipeline.scheduler).describe()
    for key, value in (base.get("noise_path") or {}).items():
        if own.get(key) != value:
            raise ValueError(
                f"the scheduler has {key} {own.get(key)!r} and the set's base {value!r}; load the base's own scheduler"
            )


def same_base(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one base, up to the rounding of half precision."""
    if a["architecture"] != b["architecture"]:
        return False
    first, second = (torch.tensor(own["probe"], dtype=torch.float64) for own in (a, b))
    return first.shape == second.shape and bool(torch.allclose(first, second, rtol=2**-6, atol=1e-6))
