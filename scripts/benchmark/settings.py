"""Settings of the three benchmarks, whose fields are options of `stepfuse benchmark`. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Any, Literal

from stepfuse.data.settings_fields import AT_LEAST_1, FINITE, Bounds, check_fields, setting

# What stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0 have in unet/config.json beside diffusers' defaults.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sdxl": dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
MODELS = ("emoji", *ARCHITECTURES)
RULES = ("product", "average_noise", "switch", "systematic", "soup", "soup_factors")  # need no reward, no oracle
SEPARATE = "separate"
BASELINES = (SEPARATE, "diffusion_blend", "set_adapters", "mixed_batch")
REFERENCES = {"ddpo": "ddpo-pytorch", "dpo": "SPO"}  # by algorithm, the implementation that it is compared with
ORIGINALS = ("image_reward", "hpsv2", "pickscore")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DType = Literal["float32", "float16", "bfloat16"]

WHAT = "what to measure"
HOW = "how to run"
NO_MEMORY = "Do not measure peak memory, which starts a process for each row (default: measure it)."
THREADS = "Number of CPU threads (default: as many as torch chooses)."


def _count(default: int | tuple[int, ...] | None, group: str, help_text: str, metavar: str = "") -> Any:
    """A number of 1 or more, or several."""
    return setting(default, group, help_text, metavar=metavar, bounds=AT_LEAST_1)


def _pixels(name: str) -> Any:
    return _count(
        None, WHAT, f"{name} of the images in pixels, such as 512 (default: that of the base model).", "PIXELS"
    )


@dataclass(frozen=True, kw_only=True)
class SamplingBenchmark:
    """Settings of `benchmark_sampling`.

    Attributes:
        model: `sd15` or `sdxl` for random weights of that architecture, or else a set.
        device, dtype: Of the model.

    Raises:
        ValueError: For numbers out of bounds and unknown names.
    """

    model: str
    adapters: tuple[int, ...] = _count(
        (1, 2, 4, 8), WHAT, "Numbers of adapters to fuse; each rule and baseline is timed with each of them.", "1,2,4,8"
    )
    rules: tuple[str, ...] = setting(("product", "systematic", "soup"), WHAT, "Fusion rules to time.", known=RULES)
    baselines: tuple[str, ...] = setting(
        BASELINES,
        WHAT,
        "Baselines to time, or '' for none. separate: the product with one forward pass per adapter; diffusion_blend: "
        "one whole UNet per adapter; set_adapters: diffusers' set_adapters before each forward pass; mixed_batch: "
        "peft's adapter_names.",
        known=BASELINES,
        aliases=("--rivals",),
    )
    images: int = _count(8, WHAT, "Images denoised at once.")
    height: int | None = _pixels("Height")
    width: int | None = _pixels("Width")
    steps: int = _count(10, WHAT, "Denoising steps of one measurement.")
    guidance_scale: float = setting(
        5.0, WHAT, "Scale of classifier-free guidance, anything but 1.", metavar="G", bounds=FINITE
    )
    repeats: int = _count(5, HOW, "Rounds of measurements, of which the median counts.")
    rows_at_once: int | None = _count(
        None,
        HOW,
        "Largest batch of one forward pass of stepfuse, in rows: one row per image and adapter, and one per image for "
        "guidance (default: all at once).",
    )
    compile: Literal["", "regional", "full"] = setting(
        "",
        HOW,
        "Compile the UNet of stepfuse and of the reference with torch.compile. regional: each transformer block; full: "
        "the whole UNet. The baselines are not compiled (default: no compilation).",
    )
    mode: str = setting(
        "",
        HOW,
        "Mode of torch.compile, such as reduce-overhead for CUDA graphs; it needs --compile (default: torch's default "
        "mode).",
        metavar="NAME",
        known=COMPILE_MODES,
    )
    memory: bool = setting(True, HOW, NO_MEMORY)
    threads: int | None = _count(None, HOW, THREADS)
    device: str = "cpu"
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.adapters:
            raise ValueError("adapters is empty; expected numbers of 1 or more")
        if self.guidance_scale == 1:
            raise ValueError(
                "guidance_scale 1 disables guidance, and the reference is one adapter with guidance; expected another"
            )
        if self.mode and not self.compile:
            raise ValueError(f"mode {self.mode!r} is a mode of torch.compile; add --compile regional or full")


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """Settings of `benchmark_training`.

    All images of an optimiser step are one micro-batch. The first fifth of the denoising steps of dpo has no
    candidates, as in SPO (4 of 20). LoRA weights are in float32. The memory of compiled rows is not measured.

    Attributes:
        dtype: Of the frozen weights and of autocast.

    Raises:
        ValueError: For numbers out of bounds and unknown names.
    """

    model: str = setting(
        "emoji", WHAT, "Base model: emoji, or sd15 or sdxl with random weights.", metavar="NAME", known=MODELS
    )
    algorithms: tuple[str, ...] = setting(
        (*REFERENCES,),
        WHAT,
        "Algorithms to time: ddpo against ddpo-pytorch, dpo against SPO.",
        known=REFERENCES,
    )
    images: int = _count(8, WHAT, "Images of one optimiser step.")
    steps: int = _count(20, WHAT, "Denoising steps.")
    candidates: int = setting(4, WHAT, "Candidates of each step of dpo and SPO, 2 or more.", bounds=Bounds(2))
    resolution: int | None = _pixels("Height and width")
    timestep_fraction: float = setting(
        1.0,
        WHAT,
        "Below 1, add rows that train on this share of the denoising steps, such as 0.5.",
        metavar="SHARE",
        bounds=Bounds(0, 1, above=True),
    )
    timesteps_per_forward: int = _count(
        1, WHAT, "Above 1, add rows that compute the loss of this many denoising steps in one forward pass."
    )
    compile: Literal["no", "regional", "full"] = setting(
        "no", WHAT, "Add rows of stepfuse with torch.compile. regional: each transformer block; full: the whole UNet."
    )
    gradient_checkpointing: bool = setting(
        False, WHAT, "Recompute activations in the backward pass, in all rows (default: keep them)."
    )
    repeats: int = _count(3, HOW, "Rounds of measurements after one to warm up, of which the median counts.")
    memory: bool = setting(True, HOW, NO_MEMORY)
    threads: int | None = _count(None, HOW, THREADS)
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.algorithms:
            raise ValueError(f"algorithms is empty; expected some of {', '.join(REFERENCES)}")
        if self.dtype == "float16" and self.device == "cpu":
            raise ValueError("dtype 'float16' cannot be trained in on the CPU; expected float32 or bfloat16")

    @property
    def skip_first_steps(self) -> int:
        """Steps of dpo without candidates."""
        return self.steps // 5


@dataclass(frozen=True, kw_only=True)
class RewardBenchmark:
    """Settings of `benchmark_rewards`.

    Raises:
        ValueError: For numbers out of bounds and unknown names.
    """

    rewards: tuple[str, ...] = setting(ORIGINALS, "", "Rewards to time.", known=ORIGINALS)
    images: str = setting(
        "", "", "Folder of images to score; it needs --prompts (default: generated images).", metavar="DIR"
    )
    prompts: str = setting(
        "",
        "",
        "Prompts of the images, in the format of `stepfuse reward score --prompts` (default: generated prompts).",
        metavar="FILE",
    )
    count: int = _count(16, "", "Number of images.")
    batch_size: int = _count(16, "", "Images that stepfuse scores at once; the packages score one at a time.")
    repeats: int = _count(3, "", "Rounds of measurements, of which the median counts.")
    size: Literal["published", "small"] = setting(
        "published", "", "Size of the models: published, or small with two layers for a quick trial."
    )
    threads: int | None = _count(None, "", THREADS)

    def __post_init__(self) -> None:
        check_fields(self)
        if bool(self.images) != bool(self.prompts):
            raise ValueError("--images and --prompts go together; give both or neither")
