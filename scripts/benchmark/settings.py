"""Settings of the three benchmarks, whose fields are options of `stepfuse benchmark`. Nothing here imports torch.

A ValueError, for a number out of bounds or an unknown name, begins with the name of the field.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from stepfuse.data.settings_fields import check_settings, setting
from stepfuse.data.settings_file import require
from stepfuse.fuse.backbones.compilation import ALL_MODES
from stepfuse.fuse.rules.registry import RULES, check_rule_name
from stepfuse.scripts.benchmark.architectures import ARCHITECTURES, TRAINED

MODELS = ("emoji", *TRAINED)
NOT_MEASURED = ("base", "kl", "code", "rgg", "oracle")  # rules that do not fuse any adapters without rewards
SEPARATE = "separate"
BASELINES = (SEPARATE, "diffusion_blend", "set_adapters", "mixed_batch")
# By algorithm, the implementation that it is compared with: on UNets, and on flow transformers.
REFERENCES = {"ddpo": "ddpo-pytorch", "dpo": "SPO"}
FLOW_REFERENCES = {"ddpo": "Flow-GRPO"}
ORIGINALS = ("image_reward", "hpsv2", "pickscore")
DType = Literal["float32", "float16", "bfloat16"]

_what, _how = partial(setting, group="what to measure"), partial(setting, group="how to run")


def _pixels(name: str) -> Any:
    text = f"{name} of the images in pixels, such as 512 (default: that of the base model)."
    return _what(None, text, metavar="PIXELS", least=1)


def _memory() -> Any:
    return _how(True, "Do not measure peak memory, which starts a process for each row (default: measure it).")


def _layers() -> Any:
    return _what(
        0,
        "Layers of an architecture with random weights, fewer than published where memory is short (default: 0, all "
        "that are published).",
        least=0,
    )


def stated_depth(model: str, layers: int) -> str:
    """`4 of 24 layers` of an architecture whose depth can be reduced; nothing of other models."""
    return ARCHITECTURES[model].stated_depth(layers) if model in ARCHITECTURES else ""


def trains_unet(model: str) -> bool:
    """Whether the network of a model of `MODELS` is a UNet."""
    return model not in ARCHITECTURES or ARCHITECTURES[model].flow is None


def references(model: str) -> dict[str, str]:
    """By algorithm, the implementation that training a model of `MODELS` is compared with, where there is one."""
    return REFERENCES if trains_unet(model) else FLOW_REFERENCES


def check_layers(model: str, layers: int) -> None:
    """Check that a model can have so many layers: 0, or fewer than are published of an architecture."""
    if model in ARCHITECTURES:
        ARCHITECTURES[model].reduced(layers)
    elif layers:
        raise ValueError(f"layers {layers}, but {model} has the layers of its weights; expected 0")


def _threads(**group: str) -> Any:
    return setting(None, "Number of CPU threads (default: as many as torch chooses).", least=1, **group)


@dataclass(frozen=True, kw_only=True)
class SamplingBenchmark:
    """Settings of `benchmark_sampling`."""

    model: str  # one of `ARCHITECTURES`, for random weights, or else a set
    layers: int = _layers()
    adapters: tuple[int, ...] = _what(
        (1, 2, 4, 8),
        "Numbers of adapters to fuse; each rule and baseline is timed with each of them.",
        metavar="1,2,4,8",
        least=1,
    )
    rules: tuple[str, ...] = _what(
        ("product", "systematic", "soup"),
        "Fusion rules to time.",
        suggestions=[rule for rule in RULES if rule not in NOT_MEASURED],
    )
    baselines: tuple[str, ...] = _what(
        BASELINES,
        "Baselines to time, or '' for none. separate: the product with one forward pass per adapter; diffusion_blend: "
        "one whole UNet per adapter; set_adapters: diffusers' set_adapters before each forward pass; mixed_batch: "
        "peft's adapter_names.",
        choices=BASELINES,
        aliases=("--rivals",),
    )
    images: int = _what(8, "Images denoised at once.", least=1)
    height: int | None = _pixels("Height")
    width: int | None = _pixels("Width")
    steps: int = _what(10, "Denoising steps of one measurement.", least=1)
    guidance_scale: float = _what(
        5.0, "Scale of guidance, anything but 1; a network that takes it as an input is given it.", metavar="G"
    )
    repeats: int = _how(5, "Rounds of measurements, of which the median counts.", least=1)
    rows_at_once: int | None = _how(
        None,
        "Largest batch of one forward pass of stepfuse, in rows: one row per image and adapter, and one per image for "
        "guidance (default: all at once).",
        least=1,
    )
    compile: Literal["", "regional", "full"] = _how(
        "",
        "Compile the UNet of stepfuse and of the reference with torch.compile. regional: each transformer block; full: "
        "the whole UNet. The baselines are not compiled (default: no compilation).",
    )
    mode: str = _how(
        "",
        "Mode of torch.compile, such as reduce-overhead for CUDA graphs; it needs --compile (default: torch's default "
        "mode).",
        metavar="NAME",
        choices=ALL_MODES,
    )
    memory: bool = _memory()
    threads: int | None = _threads(group="how to run")
    device: str = "cpu"
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        check_settings(self)
        check_layers(self.model, self.layers)
        for rule in self.rules:
            try:
                check_rule_name(rule)
            except ValueError as error:
                raise ValueError(f"rules: {error}") from error
            require(rule not in NOT_MEASURED, "rules", rule, "rules that fuse any adapters without rewards")
        require(bool(self.adapters), "adapters", "empty", "numbers of 1 or more")
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
    """

    model: str = _what(
        "emoji", f"Base model: emoji, or random weights of {', '.join(TRAINED)}.", metavar="NAME", choices=MODELS
    )
    layers: int = _layers()
    algorithms: tuple[str, ...] = _what(
        (*REFERENCES,),
        "Algorithms to time: on UNets ddpo against ddpo-pytorch, dpo against SPO; on sd35 ddpo against Flow-GRPO.",
        choices=REFERENCES,
    )
    images: int = _what(8, "Images of one optimiser step.", least=1)
    steps: int = _what(20, "Denoising steps.", least=1)
    candidates: int = _what(4, "Candidates of each step of dpo and SPO, 2 or more.", least=2)
    resolution: int | None = _pixels("Height and width")
    timestep_fraction: float = _what(
        1.0,
        "Below 1, add rows that train on this share of the denoising steps, such as 0.5.",
        metavar="SHARE",
        above=0,
        most=1,
    )
    timesteps_per_forward: int = _what(
        1, "Above 1, add rows that compute the loss of this many denoising steps in one forward pass.", least=1
    )
    compile: Literal["no", "regional", "full"] = _what(
        "no", "Add rows of stepfuse with torch.compile. regional: each transformer block; full: the whole UNet."
    )
    gradient_checkpointing: bool = _what(
        False, "Recompute activations in the backward pass, in all rows (default: keep them)."
    )
    repeats: int = _how(3, "Rounds of measurements after one to warm up, of which the median counts.", least=1)
    memory: bool = _memory()
    threads: int | None = _threads(group="how to run")
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: DType = "float32"  # of the frozen weights and of autocast

    def __post_init__(self) -> None:
        check_settings(self)
        check_layers(self.model, self.layers)
        require(bool(self.algorithms), "algorithms", "empty", f"some of {', '.join(REFERENCES)}")
        if self.dtype == "float16" and self.device == "cpu":
            raise ValueError("dtype 'float16' cannot be trained in on the CPU; expected float32 or bfloat16")

    @property
    def skip_first_steps(self) -> int:
        """Steps of dpo without candidates."""
        return self.steps // 5


@dataclass(frozen=True, kw_only=True)
class RewardBenchmark:
    """Settings of `benchmark_rewards`."""

    rewards: tuple[str, ...] = setting(ORIGINALS, "Rewards to time.", choices=ORIGINALS)
    images: str = setting(
        "", "Folder of images to score; it needs --prompts (default: generated images).", metavar="DIR"
    )
    prompts: str = setting(
        "",
        "Prompts of the images, in the format of `stepfuse reward score --prompts` (default: generated prompts).",
        metavar="FILE",
    )
    count: int = setting(16, "Number of images.", least=1)
    batch_size: int = setting(16, "Images that stepfuse scores at once; the packages score one at a time.", least=1)
    repeats: int = setting(3, "Rounds of measurements, of which the median counts.", least=1)
    size: Literal["published", "small"] = setting(
        "published", "Size of the models: published, or small with two layers for a quick trial."
    )
    threads: int | None = _threads()

    def __post_init__(self) -> None:
        check_settings(self)
        require(bool(self.rewards), "rewards", "empty", f"some of {', '.join(ORIGINALS)}")
        if bool(self.images) != bool(self.prompts):
            raise ValueError("images and prompts go together; give both or neither")
