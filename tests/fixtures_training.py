"""The small models that training is tested on: seconds a run, and every kind of layer."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule
from stepfuse.fuse.rules.plan import Expert
from stepfuse.rewards.scoring_queue import ScoringQueue
from stepfuse.train import ddpo, dpo
from stepfuse.train.algorithms import DDPO
from stepfuse.train.arguments import parse_settings
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.loop import train_adapter
from stepfuse.train.lora import Policy, add_lora
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import branching_rollout, sample_generator
from stepfuse.train.settings import SETTINGS, DDPOSettings
from tests.fixtures_tiny import denoiser_of, prompt_embeds

SINGLE_PROCESS = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
MAIN = {"dpo": dpo.main, "ddpo": ddpo.main}
COMMON = {
    "prompts": "prompts.txt",
    "reward": "rewards.py:slope",
    "output_dir": "out",
    "report_to": "none",
    "sample_num_steps": 3,
    "sample_guidance_scale": 2.0,
    "num_validation_images": 4,
    "train_batch_size": 4,
    "learning_rate": 0.01,
    "beta": 0.1,
}
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's
SHAPE = (4, 8, 8)
ETA = EtaSchedule(eta=0.8)
BENT = LearnedSchedule(offsets=torch.tensor([0.4, -0.7, 0.2]), eta=0.8)
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]


@contextmanager
def training_desk(monkeypatch, folder: Path, rewards: str) -> Iterator[Path]:
    """A folder with prompts and rewards to work in; libraries speak again afterwards."""
    monkeypatch.chdir(folder)
    Path("prompts.txt").write_text("a red apple\na cat\ntwo keys\n")
    Path("rewards.py").write_text(rewards)
    verbosity = [library.utils.logging.get_verbosity() for library in (diffusers, transformers)]
    yield folder
    for library, before in zip((diffusers, transformers), verbosity, strict=True):
        library.utils.logging.set_verbosity(before)
        library.utils.logging.enable_progress_bar()
    forget_accelerator()


def launch_command(program: Path, *arguments: str, launcher: Sequence[str] = SINGLE_PROCESS) -> list[str]:
    """`accelerate launch` of a program; what conftest put into the environment, its processes have too."""
    return [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(program), *arguments]


def as_flags(values: dict) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run_main(monkeypatch, algorithm: str, **flags) -> None:
    """main() of one algorithm, with these flags beside the common ones."""
    config = Path(str(flags.get("config", "")))
    several = config.is_file() and "objectives:" in config.read_text()  # each of which has a reward
    flags = {name: value for name, value in COMMON.items() if name != "reward" or not several} | flags
    if algorithm == "ddpo":
        flags.setdefault("num_generations", 2)
    monkeypatch.setattr(sys, "argv", [f"train/{algorithm}.py", *as_flags(flags)])
    forget_accelerator()
    MAIN[algorithm]()


def train_here(folder: Path, algorithm: str, settings: dict, output: str, **flags) -> Path:
    """A run in this process, from a folder: settings as a config file, the rest as flags."""
    (folder / f"{output}.yaml").write_text(yaml.safe_dump(settings))
    words = as_flags({"config": f"{output}.yaml", "output_dir": output} | flags)
    forget_accelerator()
    with chdir(folder):
        train_adapter(parse_settings(SETTINGS[algorithm], words))
    forget_accelerator()
    return folder / output


def refused_by(run, *arguments, **flags) -> str:
    """The line that a main() exits with."""
    with pytest.raises(SystemExit) as error:
        run(*arguments, **flags)
    line = error.value.code
    assert isinstance(line, str)  # Python prints it to stderr, and exits with 1
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def tiny_unet() -> UNet2DConditionModel:
    """Random weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    return unet.requires_grad_(False).eval()


class PolicyWorld:
    """A policy, its denoiser, two prompts and the sampler's steps."""

    def __init__(self, *, guidance="shared", schedule=ETA, dtype=torch.float32, trained=False):
        self.unet = tiny_unet().to(dtype)
        add_lora(self.unet, "mine", rank=4, alpha=8, targets=PROJECTIONS, seed=1)
        self.unet.train()
        self.schedule = schedule
        scheduler = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
        self.denoiser = denoiser_of(self.unet, scheduler, guidance=guidance, guidance_scale=3.0)
        self.policy = Policy(self.denoiser.backbone, ["mine"], [schedule])
        if trained:
            generator = torch.Generator().manual_seed(2)
            for factor in self.factors("lora_B"):
                factor.data.normal_(std=0.1, generator=generator)
        words = torch.randn(2, 2, 6, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
        self.conditioning = prompt_embeds(words[0], words[1])
        generators = [sample_generator(0, "rollout", i) for i in range(2)]
        steps = self.denoiser.path.steps(3)
        sampling = Sampling(
            denoiser=self.denoiser, objectives=(Expert.adapter("mine", schedule),), steps=steps, shape=SHAPE
        )
        self.place = (sampling, self.conditioning, generators)

    def factors(self, kind):
        return [p for name, p in self.unet.named_parameters() if kind in name]

    def pairs(self):
        options = dict(candidates=3, margin=0.0)
        return branching_rollout(*self.place, score_latents=at_once(lambda x: x.flatten(1).sum(1)), **options).steps

    def gaussians(self, step):
        (both,) = step_gaussians(self.policy, self.place[0], [step], self.conditioning)
        return both


class Watched(DDPO):
    """DDPO that keeps the log-ratio to the rollout, and to the reference, of each loss."""

    def __init__(self, settings):
        super().__init__(settings)
        self.ratios, self.kl = [], []

    def loss(self, policy, reference, step):
        self.ratios.append((policy.log_prob(step.x_s) - step.log_prob).tolist())
        self.kl.append(policy.kl(reference).mean().item())
        return super().loss(policy, reference, step)


def two_epochs(base: Path, **own) -> DDPOSettings:
    """Two rollouts of three denoising steps, two updates on each."""
    common = COMMON | {"pretrained_model_name_or_path": str(base), "num_generations": 2}
    return DDPOSettings(**common | {"num_inner_epochs": 2, "max_train_steps": 4} | own)


def forget_accelerator():
    """accelerate keeps one state a process: the next run has its own settings."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def at_once(score):
    """A function of latents that answers with a future of one column, as the queue does, here done at once."""
    return lambda latents: ScoringQueue(ahead=0).submit(lambda: score(latents)[:, None])


def save_tiny_pipeline(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(emoji.PIPELINE / "tokenizer")
    unet = tiny_unet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
