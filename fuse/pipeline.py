"""Base models as diffusers pipelines: loading them, prompts to embeddings, latents to pixels and back."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Float
from torch import Tensor

from stepfuse.data import emoji
from stepfuse.fuse.base_checks import check_base, check_has_texts
from stepfuse.fuse.path import NoisePath
from stepfuse.fuse.quiet import (
    TRUNCATION,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    quiet_loading,
    retrieve_latents,
    without_messages,
)
from stepfuse.fuse.weight_files import cached_folder, check_complete, component_variants, file_names, only_variant

EMBEDDED = {"emoji": emoji.PIPELINE}
IGNORED_PARTS = ("safety_checker", "image_encoder", "feature_extractor")  # of pipelines, when they are loaded
logger = logging.getLogger(__name__)


def load_pipeline(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    safe: bool = False,
    **options: Any,
) -> DiffusionPipeline:
    """Load a Stable Diffusion (1.x, 2.x or XL) pipeline from the hub, a folder, or `emoji`, the embedded base.

    The safety checker and the invisible watermark are not loaded: rewards see every image as it was drawn. Everything
    else in its configuration is supported or refused, see `check_base`.

    Args:
        name_or_path: as for `DiffusionPipeline.from_pretrained`, or `emoji`.
        dtype: of every component.
        revision: a branch, tag or commit on the hub.
        variant: of the weight files, `fp16` for instance. Where there are files of one variant only, it is found.
        safe: take weights in safetensors only, as is right for bases that are named by other people's sets.
        options: passed on to `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: for a pipeline that is neither Stable Diffusion nor Stable Diffusion XL or that has an unsupported
            configuration, a folder without one, and weights that are not there in this variant.
    """
    path = str(EMBEDDED.get(name_or_path, name_or_path))
    try:
        index = DiffusionPipeline.load_config(path, revision=revision)
    except OSError as error:
        raise ValueError(
            f"no diffusers pipeline at {name_or_path!r}: expected a hub id, a folder with model_index.json, relative "
            f"to {Path.cwd()} unless it is absolute, or one of {', '.join(EMBEDDED)} ({str(error).splitlines()[0]})"
        ) from error
    options = {k: v for k, v in options.items() if v is not None} | {"dtype": dtype, "revision": revision}
    if safe:
        options |= {"use_safetensors": True}
    if "safety_checker" in index:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if index.get("_class_name") == "StableDiffusionXLPipeline":
        options |= {"add_watermarker": False}
    with quiet_loading(progress=name_or_path not in EMBEDDED):
        try:
            pipeline = DiffusionPipeline.from_pretrained(path, variant=variant, **options)
        except (OSError, ValueError, NotImplementedError) as error:
            found = _other_variant(name_or_path, index, revision, variant, error, safe=safe)
            pipeline = DiffusionPipeline.from_pretrained(path, variant=found, **options)
    if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise ValueError(
            f"{name_or_path!r} is a {type(pipeline).__name__}; expected StableDiffusionPipeline or "
            "StableDiffusionXLPipeline"
        )
    try:
        check_complete(pipeline, path, revision, options)
    except ValueError as error:
        raise ValueError(f"{name_or_path!r} cannot be loaded: {error}") from error
    check_base(pipeline, repr(name_or_path))
    check_has_texts(pipeline, repr(name_or_path))
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipeline


def _other_variant(
    name: str, index: Mapping[str, Any], revision: str | None, variant: str | None, error: Exception, *, safe: bool
) -> str:
    """The only variant that there are weights of, where a pipeline could not be loaded under none.

    Raises:
        ValueError: naming the variants that there are, or else what went wrong.
    """
    kind = " from safetensors" if safe else ""
    told = f"{name!r} cannot be loaded{kind}: {str(error).strip().splitlines()[0]}"
    parts = [part for part in index if part not in IGNORED_PARTS]
    found = component_variants(file_names(str(EMBEDDED.get(name, name)), revision), parts, safe=safe)
    if variant is not None:
        known = sorted({str(other) for variants in found.values() for other in variants - {None}})
        if variant not in known:
            told = f"{name!r} has no weights under variant {variant!r}; it has {', '.join(known) or 'no variants'}"
        raise ValueError(told) from error
    try:
        other = only_variant(found)
    except ValueError as several:
        raise ValueError(f"{name!r} cannot be loaded{kind}: {several}") from error
    if other is None:
        raise ValueError(told) from error
    logger.warning("%r has weights under variant %s only, which is loaded", name, other)
    return other


def load_base(base: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load the base that an adapter or a set names, at its recorded revision and variant, from safetensors only.

    Raises:
        ValueError: see `load_pipeline`.
    """
    return load_pipeline(
        base["name_or_path"], dtype=dtype, revision=base.get("revision"), variant=base.get("variant"), safe=True
    )


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
    prompts: Sequence[str] | None,
    negative_prompts: Sequence[str | None] | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    device: torch.device | None = None,
    prompt_embeds: Float[Tensor, "batch tokens width"] | None = None,
    negative_prompt_embeds: Float[Tensor, "batch tokens width"] | None = None,
    pooled_prompt_embeds: Float[Tensor, "batch pooled"] | None = None,
    negative_pooled_prompt_embeds: Float[Tensor, "batch pooled"] | None = None,
) -> Conditioning:
    """Embed prompts as the pipeline itself does; height and width matter to SDXL only.

    Args:
        prompts: None where embeddings are given.
        negative_prompts: one a prompt. None stands for no negative prompt, which is not the same as "": where SDXL's
            `force_zeros_for_empty_prompt` is set, its embedding is zero; elsewhere it is that of "".
        device: of the text encoders; by default that on which the pipeline computes.
        prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds: embeddings to take
            instead, the pooled ones of SDXL only; as in diffusers' pipelines.

    Raises:
        ValueError: for prompts without a text encoder.
    """
    xl = isinstance(pipeline, StableDiffusionXLPipeline)
    if prompt_embeds is None or (negative_prompt_embeds is None and not _zeros_without(pipeline, negative_prompts)):
        check_has_texts(pipeline)
    count = len(prompts) if prompts is not None else len(cast(Tensor, prompt_embeds))
    negatives = [None] * count if negative_prompts is None else list(negative_prompts)
    absent = torch.tensor([negative is None for negative in negatives])
    arguments: dict[str, Any] = dict(
        prompt=None if prompts is None else list(prompts),
        device=device or execution_device(pipeline),
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=None if bool(absent.all()) else [negative or "" for negative in negatives],
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
    )
    with without_messages(*TRUNCATION):  # `prompt_length` reports it
        if not xl:
            positive, negative = pipeline.encode_prompt(**arguments)
            return Conditioning(positive=positive, negative=negative)
        positive, negative, pooled, negative_pooled = pipeline.encode_prompt(
            **arguments,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
        )
    pooled, negative_pooled = pooled.to(positive), negative_pooled.to(positive)
    if negative_prompt_embeds is None and pipeline.config.force_zeros_for_empty_prompt:
        zeros = absent.to(positive.device)  # of a list that has some, the others were embedded
        negative = torch.where(zeros[:, None, None], 0, negative)
        negative_pooled = torch.where(zeros[:, None], 0, negative_pooled)
    height, width = image_size(pipeline, height, width)
    encoder = pipeline.text_encoder_2
    ids = pipeline._get_add_time_ids(
        (height, width),
        (0, 0),
        (height, width),
        dtype=positive.dtype,
        text_encoder_projection_dim=pooled.shape[-1] if encoder is None else encoder.config.projection_dim,
    ).to(positive.device)
    ids = ids.expand(count, -1)
    return Conditioning(
        positive=positive,
        negative=negative,
        added={"text_embeds": (pooled, negative_pooled), "time_ids": (ids, ids)},
    )


def _zeros_without(pipeline: DiffusionPipeline, negative_prompts: Sequence[str | None] | None) -> bool:
    """Whether the negative embedding is zero, so that no text is embedded for it."""
    none = negative_prompts is None or all(negative is None for negative in negative_prompts)
    return none and bool(pipeline.config.get("force_zeros_for_empty_prompt"))


def image_size(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default those the UNet was trained at.

    Raises:
        ValueError: for a size the pipeline cannot draw, or none where the UNet does not state one.
    """
    factor = pipeline.vae_scale_factor
    native = pipeline.unet.config.sample_size
    if native is None:
        if height is None or width is None:
            raise ValueError("the base's UNet has sample_size None; give height and width, or resolution in training")
        native = (0, 0)
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
    return VaeImageProcessor.denormalize(decode_unclamped(pipeline, latents))


def decode_unclamped(
    pipeline: DiffusionPipeline, latents: Float[Tensor, "batch channels h w"]
) -> Float[Tensor, "batch 3 height width"]:
    """Latents → what the autoencoder makes of them, in float32 and for the most part in [-1, 1].

    z = latents / scaling_factor; where the autoencoder has `latents_mean` and `latents_std`, as some of SDXL,
    z = latents · latents_std / scaling_factor + latents_mean.
    """
    vae = _upcast_autoencoder(pipeline)
    mean, deviation = _latent_statistics(pipeline, latents)
    z = latents * deviation / vae.config.scaling_factor + mean
    return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()


def encode_pixels(
    pipeline: DiffusionPipeline,
    pixels: Float[Tensor, "batch 3 height width"],
    generators: torch.Generator | list[torch.Generator] | None,
) -> Float[Tensor, "batch channels h w"]:
    """Pixels in [0, 1] → float32 latents, a sample of what the autoencoder encodes; the inverse of `decode_latents`."""
    vae = _upcast_autoencoder(pipeline)
    encoded = vae.encode(VaeImageProcessor.normalize(pixels.to(vae.device, vae.dtype)))
    z = retrieve_latents(encoded, generator=generators).float()
    mean, deviation = _latent_statistics(pipeline, z)
    return (z - mean) * vae.config.scaling_factor / deviation


def _upcast_autoencoder(pipeline: DiffusionPipeline) -> Any:
    """The autoencoder, in float32 where half precision would overflow, as in SDXL's."""
    vae = pipeline.vae
    if getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16:
        vae.to(torch.float32)
    return vae


def _latent_statistics(pipeline: DiffusionPipeline, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the autoencoder's latents by channel; 0 and 1 where it states none, as most do."""
    config = pipeline.vae.config
    values = [config.get("latents_mean"), config.get("latents_std")]
    if any(value is None for value in values):
        return like.new_zeros(()), like.new_ones(())
    mean, deviation = (torch.tensor(value, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for value in values)
    return mean, deviation


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
    pipeline: DiffusionPipeline,
    name_or_path: str,
    revision: str | None = None,
    *,
    variant: str | None = None,
    hashed: bool = True,
) -> dict[str, Any]:
    """What an adapter says of the base it belongs to.

    Its fingerprint tells bases apart whatever their precision. `weights_sha256` is of the UNet as it was loaded: its
    tensors' names and bytes, in the order of names; in another precision it is another. It is left out unless `hashed`,
    for it takes seconds of large ones. `variant` is that of the weight files, if they are of one.
    """
    path = NoisePath.from_scheduler(pipeline.scheduler)
    variant = variant or loaded_variant(pipeline, name_or_path, revision)
    return {
        "name_or_path": name_or_path,
        "revision": cached_commit(name_or_path, revision) or revision,
        "weights_sha256": weights_hash(pipeline.unet) if hashed else None,
        "noise_path": path.describe(),
        **({"variant": variant} if variant else {}),
    } | base_fingerprint(pipeline.unet)


def cached_commit(repository: str, revision: str | None) -> str | None:
    """The commit that a hub id was loaded at, if it is one and is in the hub's cache."""
    folder = cached_folder(repository, revision)
    return None if folder is None or folder == Path(repository) else folder.name


def loaded_variant(pipeline: DiffusionPipeline, name_or_path: str, revision: str | None) -> str | None:
    """The variant that a pipeline was loaded under when none was asked for, by its files on this machine."""
    files = file_names(str(EMBEDDED.get(name_or_path, name_or_path)), revision, ask=False)
    try:
        return only_variant(component_variants(files, pipeline.components))
    except ValueError:
        return None


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
