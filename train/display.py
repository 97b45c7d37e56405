"""Messages of a run to the user: its start, its progress and its result. On the main process only."""

import math
import shlex
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stepfuse.data import emoji
from stepfuse.data.kl_steps import largest_step
from stepfuse.data.output_file import unused_path
from stepfuse.train.checkpoints import Progress
from stepfuse.train.joint_settings import CENTRE
from stepfuse.train.output import adapter_folder
from stepfuse.train.settings import TrainSettings
from stepfuse.train.validation_points import objective_rewards, objective_validation, paired_gain

WINDOW = 20  # steps that running means are taken over
REPORTS = 20  # lines of a run in a log file
SPARE = 6  # columns by which a line may become longer before its next step, by the time that is left
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # the measured values need the room of a bar


class ProgressDisplay:
    """A line that is kept up to date on a terminal; in a log file, a line after every twentieth of the steps.

    The reward, the images per second and the time left are means over the last 20 steps, since every step has other
    prompts. The time left is that of the training alone, without its last validation.

    Args:
        images: Number of images, of all processes, that a step is trained on.
        shown: Whether this process shows anything.
    """

    def __init__(self, settings: TrainSettings, step: int, *, images: int, shown: bool) -> None:
        self.total, self.step, self.images = settings.max_train_steps, step, images
        terminal = sys.stderr.isatty()
        self.name = f"train {settings.title}"
        self.bar = tqdm(
            total=self.total,
            initial=step,
            desc=self.name if len(settings.each) == 1 else "train",  # the names of several are those of their rewards
            bar_format=LINE,
            disable=not (shown and terminal),
            dynamic_ncols=True,
        )
        self.lines = shown and not terminal
        self.rewards: dict[str, deque[float]] = {}
        self.speeds: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self.since = time.monotonic()

    def resume_clock(self) -> None:
        """Start to measure time, at the start of a rollout and after validation."""
        self.since = time.monotonic()

    def advance(self, measured: Mapping[str, float], *, new_images: bool) -> None:
        """Show one more step, by its measured values; `new_images` is for the first step on a rollout."""
        now = time.monotonic()
        self.step += 1
        self.speeds.append((self.images if new_images else 0, now - self.since))
        self.since = now
        for name, value in measured.items():
            if name.startswith("reward") and new_images and math.isfinite(value):
                self.rewards.setdefault(name, deque(maxlen=WINDOW)).append(value)
        means = {name.replace("reward/", ""): sum(known) / len(known) for name, known in self.rewards.items()}
        parts = [f"mean {name} {mean:.4g}" for name, mean in means.items()]
        parts += [f"{name} {measured[name]:.4g}" for name in ("loss", "kl") if name in measured]
        counts, seconds = map(sum, zip(*self.speeds, strict=True))
        parts.append(f"{counts / max(seconds, 1e-9):.3g} images/s")
        self._show_fitting(parts)
        self.bar.update()
        if self.lines and self.step * REPORTS // self.total > (self.step - 1) * REPORTS // self.total:
            left = tqdm.format_interval(seconds / len(self.speeds) * (self.total - self.step))
            line = ", ".join([f"{self.name}: step {self.step}/{self.total}", *parts, f"{left} left"])
            print(line, file=sys.stderr, flush=True)

    def _show_fitting(self, parts: Sequence[str]) -> None:
        """Those of the parts, from the first on, for which the line of the terminal has room."""
        for count in range(len(parts), -1, -1):
            self.bar.set_postfix_str(", ".join(parts[:count]), refresh=False)
            width = self.bar.format_dict["ncols"]
            if not width or len(str(self.bar)) <= width - SPARE:
                return

    def close(self) -> None:
        self.bar.close()


def describe_start(settings: TrainSettings, start: Path | None, step: int) -> str:
    """Say which checkpoint a run resumes from; empty for a run that does not resume."""
    if start is not None:
        return f"resuming from {start}: step {step} of {settings.max_train_steps}"
    if settings.resume_from_checkpoint is not None:
        return f"no checkpoint in {settings.output_dir} yet: starting from step 0"
    return ""


def describe_end(settings: TrainSettings, progress: Progress, rewards: Sequence[str]) -> str:
    """Say where the adapters are, what the validation images show, and which command comes next.

    Args:
        rewards: the name of each objective's reward.
    """
    output = Path(settings.output_dir)
    folders = [adapter_folder(output, settings, each.name) for each in settings.each]
    lines = []
    for each, folder, reward in zip(settings.each, folders, rewards, strict=True):
        lines.append(f"adapter {each.name}, step {progress.step}: {folder}")
        validation = objective_validation(progress, each.name)
        if "before" in validation and "after" in validation:
            lines.append(_describe_validation(reward, validation, progress, [each.name] * 2))
    if settings.objectives and {"before", "after"} <= set(progress.validation):
        lines.append(f"with equal weights, rule {settings.train_rule}:")
        for each in settings.each:
            points = {
                moment: progress.validation[moment]["points"][CENTRE][each.name] for moment in ("before", "after")
            }
            lines.append("  " + _describe_validation(each.name, points, progress, [CENTRE, each.name]))
    if progress.kl is not None:
        lines.append(f"KL divergence to the base model, before the last update: {progress.kl:.4g} nats per image")
        if largest := largest_step(progress.kl_steps):
            index, share = largest
            lines[-1] += f", {100 * share:.0f} % of it in denoising step {index + 1} of {len(progress.kl_steps)}"
    which = "these" if settings.objectives else "this and other"
    lines.append(f"next, make a set of {which} adapters (--adapter is repeated), and generate images:")
    prompt = progress.validation_prompts[0] if progress.validation_prompts else "a prompt"
    scale = emoji.GUIDANCE_SCALES.get(settings.pretrained_model_name_or_path) if settings.guidance == "off" else None
    return "\n".join([*lines, *next_commands(output, prompt, guidance_scale=scale)])


def next_commands(output: Path, prompt: str, *options: str, guidance_scale: float | None = None) -> list[str]:
    """The commands that make a set of a run's adapters and draw an image with it, one a line.

    Args:
        output: folder of the run; that of the set is named after it.
        options: of the image.
        guidance_scale: of the images of the set, if the adapters were trained without guidance and images need it.
    """
    named = output if output.name not in ("", "..") else output.resolve()  # `.` has no name
    folder = unused_path(named.with_name(f"{named.name}-set") if named.name else named / "set")
    create = ["stepfuse", "set", "create", str(folder), "--adapter", str(output)]
    if guidance_scale is not None:
        create += ["--guidance", "shared", "--guidance_scale", str(guidance_scale)]
    sample = ["stepfuse", "sample", str(folder), "--prompt", prompt, *options]
    return [f"  {shlex.join(command)}" for command in (create, sample)]


def _describe_validation(reward: str, validation: Mapping[str, Any], progress: Progress, path: Sequence[str]) -> str:
    """The reward before and after, and its gain; `path` leads to the rewards of a run with several objectives."""
    before, after = validation["before"], validation["after"]
    rewards = objective_rewards(progress, *path)
    line = f"reward {reward} on {after['images']} validation images: {before['reward']:.4g} → {after['reward']:.4g}"
    gain = describe_gain(rewards, progress.validation_prompts)
    if not gain and rewards.get("before"):
        gain = " (no gain: the images after were generated with another seed, other prompts or other settings)"
    return line + gain


def describe_gain(rewards: Mapping[str, Sequence[float]], prompts: Sequence[str]) -> str:
    """The mean gain of the validation reward and its 95 % interval, or why there is none."""
    gain = paired_gain(rewards, prompts)
    if gain is None:
        known = rewards.get("before") and rewards.get("after")  # a resumed run may have other validation prompts
        return " (no interval: there is one validation prompt only)" if known else ""
    return (
        f", gain {gain.mean:+.4g} (95 % interval {gain.low:+.4g} to {gain.high:+.4g}, "
        f"paired bootstrap over {len(set(prompts))} prompts)"
    )
