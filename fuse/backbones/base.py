"""A model family: the one place that knows how a pipeline's network, text encoders and autoencoder are called."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Float
from torch import Tensor, nn

from stepfuse.fuse.backbones.autoencoder import upcast
from stepfuse.fuse.backbones.compilation import CUDA_GRAPHS
from stepfuse.fuse.backbones.conditioning import Conditioning, Inputs
from stepfuse.fuse.backbones.guidance import Guidance, Latents
from stepfuse.fuse.diffusion.gaussian import Generators
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.lora.names import LayerNames

RESOLUTION = "_resolution"  # in the pipeline's configuration, where names without _ are those of components
Shape = tuple[int, int, int]  # channels, height and width of one latent
Pixels = Float[Tensor, "batch 3 image_height image_width"]  # other sizes than those of `Latents`


class Backbone(ABC):
    """A diffusers pipeline, through the interface that is the same for every model family.

    Latents are (batch, channels, height, width) everywhere else; what a network wants otherwise is done in `predict`.

    Attributes:
        pipeline: the base. An autoencoder that overflows in float16 is moved to float32.
        decode_batch_size: the most images that the autoencoder decodes or encodes at once; None for as many as fit into
            a share of the memory.
        part: the pipeline's name of the network that LoRAs are of, which is also the prefix of their keys in files.
        blocks: class names of the blocks that the network repeats, which regional compilation compiles.
        unbatched: names of layers whose first dimension is not that of images; a LoRA there cannot be batched.
        records_graphs: whether the network was compiled with CUDA graphs.
        embeds: the arguments of `encode` that take embeddings in place of prompts.
    """

    part: ClassVar[str]
    blocks: ClassVar[Sequence[str]] = ()
    unbatched: ClassVar[Sequence[str]] = ()
    embeds: ClassVar[Sequence[str]] = ("prompt_embeds", "negative_prompt_embeds")

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.decode_batch_size: int | None = None
        self.records_graphs = False
        self._device: torch.device | None = None
        upcast(pipeline.components.get("vae"))

    @property
    def resolution(self) -> int | None:
        """Height and width in pixels that the adapters of this base were trained at, where that is not its own size."""
        return self.pipeline.config.get(RESOLUTION)

    @property
    def network(self) -> Any:  # an `nn.Module` with the methods of diffusers' models
        return getattr(self.pipeline, self.part)

    @property
    def targets(self) -> Sequence[str]:
        """Names, or ends of names, of the layers that get a LoRA by default, at least all projections of attention."""
        return ("to_q", "to_k", "to_v", "to_out.0")

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes; with offloading its modules lie elsewhere meanwhile."""
        return self._device or self.pipeline._execution_device

    def keep_device(self) -> None:
        """Look up `device` once and for all, for diffusers goes through all modules; the pipeline must then stay."""
        self._device = self.pipeline._execution_device

    def compile(self, how: str, **options: Any) -> None:
        """Compile the network in place, with these options of `torch.compile`.

        `regional`: the blocks that it repeats, once for each width, in seconds; `full`: all of it, in minutes.

        Torch's limit of graphs for one piece of code becomes 64, where it is less, for blocks of all widths share it:
        each is compiled for adapters and without, with gradients and without, and for two numbers of rows at least.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.records_graphs = options.get("mode") in CUDA_GRAPHS
        if how == "full":
            self.network.compile(**options)
            return
        blocks = [module for module in self.network.modules() if type(module).__name__ in self.blocks]
        if not blocks:
            raise ValueError(f"the network has no blocks to compile ({', '.join(self.blocks)}); compile it in full")
        for block in blocks:
            block.compile(**options)

    @classmethod
    def load_options(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Further arguments of `from_pretrained`, for a pipeline with this model_index.json.

        Components that it was saved without are given as None, which diffusers otherwise takes for forgotten.
        """
        return {part: None for part, value in index.items() if value in ([None, None], (None, None))}

    @classmethod
    def names(cls, config: Mapping[str, Any]) -> LayerNames:
        """Names of the network's layers in other tools' files, by the network's configuration."""
        return LayerNames.of(cls.part)

    @abstractmethod
    def check(self) -> None:
        """Check that everything in the pipeline's configuration that changes its images is supported.

        Text encoders and tokenizers may be missing, where embeddings are given instead of prompts. A ValueError names
        the component, the key, its value and what is expected.
        """

    @abstractmethod
    def check_can_encode(self) -> None:
        """Check that the pipeline has what it needs to embed prompts; a ValueError names what it lacks."""

    @abstractmethod
    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width in pixels, by default `resolution`, or else those the network was trained at; a ValueError
        for others than it can draw, and for none where the network states none.
        """

    @abstractmethod
    def shape(self, height: int | None = None, width: int | None = None) -> Shape:
        """Channels, height and width of one latent of such an image."""

    @property
    def default_shape(self) -> Shape | None:
        """The shape of a latent of the default size; None where there is none."""
        try:
            return self.shape()
        except ValueError:
            return None

    def path(self, shape: Shape | None = None) -> NoisePath:
        """The noise path of the pipeline's scheduler, for latents of a shape."""
        path = NoisePath.from_scheduler(self.pipeline.scheduler)
        return path if shape is None else self.bind(path, shape)

    def bind(self, path: NoisePath, shape: Shape) -> NoisePath:
        """A path for latents of a shape; the same one unless the scheduler's shift depends on the number of tokens."""
        return path

    @abstractmethod
    def encode(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str | None] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        device: torch.device | None = None,
        **embeds: Tensor | None,
    ) -> Conditioning:
        """Embed prompts as the pipeline itself does; a ValueError says which text encoder is missing.

        Args:
            prompts: None where embeddings are given.
            negative_prompts: one a prompt; None stands for no negative prompt.
            height, width: of the images, which some networks are given.
            device: of the text encoders; by default that on which the pipeline computes.
            embeds: embeddings to take instead, by the names in `embeds`.
        """

    def check_embeds(self, given: Sequence[str]) -> None:
        """Check that the embeddings that are given, by name, are all that are needed, and no others."""
        if unknown := [name for name in given if name not in self.embeds]:
            raise ValueError(f"{unknown[0]} is given; this model takes {', '.join(self.embeds)}")

    @abstractmethod
    def predict(self, x: Latents, times: Tensor, inputs: Inputs, *, network: nn.Module | None = None) -> Latents:
        """One forward: the network's prediction, in float32 or wider, as the noise path takes it.

        Args:
            times: of the network, one a row (`NoisePath.network_time`).
            inputs: as `Conditioning.inputs` gives them.
            network: run in place of the pipeline's, a wrapped one for instance.
        """

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network takes the guidance scale as an input, `guidance` (guidance distillation)."""
        return False

    def check_guidance(self, guidance: Guidance) -> None:
        """Check that the network takes such guidance."""
        if guidance.source == "embedded" and not self.embeds_guidance:
            raise ValueError(
                f"guidance embedded, but {type(self.network).__name__} does not take the guidance scale as an input; "
                "expected one of shared, full, off"
            )

    def guidance_inputs(self, guidance: Guidance, like: Latents) -> dict[str, Tensor]:
        """The network's inputs that say how it is guided, a row a latent: with `embedded` the scale g, otherwise 1."""
        if not self.embeds_guidance:
            return {}
        return {"guidance": torch.full((len(like),), guidance.embedded_scale, device=like.device)}

    def tokenizer(self, name: str) -> Any:
        """One of the pipeline's tokenizers; None where it has none."""
        return getattr(self.pipeline, name)

    def token_limits(self) -> dict[str, int]:
        """The most tokens of a prompt, by the name of the tokenizer that cuts the rest."""
        names = [name for name in ("tokenizer", "tokenizer_2") if name in self.pipeline.components]
        known = {name: getattr(self.pipeline, name) for name in names}
        return {name: tokenizer.model_max_length for name, tokenizer in known.items() if tokenizer is not None}

    def guide(self, negative: Latents, positive: Latents, scale: float) -> Latents:
        """e_u + g (e_c - e_u)."""
        return negative + scale * (positive - negative)

    def decode(self, latents: Latents) -> Pixels:
        """Latents → float32 pixels in [0, 1], differentiable."""
        return VaeImageProcessor.denormalize(self.decode_unclamped(latents))

    @abstractmethod
    def decode_unclamped(self, latents: Latents) -> Pixels:
        """Latents → what the autoencoder makes of them, in float32 and for the most part in [-1, 1]."""

    @abstractmethod
    def encode_pixels(self, pixels: Pixels, generators: Generators) -> Latents:
        """Pixels in [0, 1] → float32 latents, a sample of what the autoencoder encodes; the inverse of `decode`."""
