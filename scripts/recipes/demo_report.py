"""What the demo prints at its end: the gains, what they show, where the pictures are, and the next commands."""

import shlex
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from stepfuse.data.intervals import interval_text
from stepfuse.rewards.registry import reward_unit

PROMPT = "a fox on a green background"


def report(output: Path, results: Mapping) -> None:
    """Print the table of gains, every claim with whether its interval shows it, and the next commands."""
    print(gains_table(results))
    print()
    for claim, gain in claims(results).items():
        print(f"{'shown    ' if gain['low'] > 0 else 'NOT SHOWN'}  {claim}")
    slider, front, numbers = (output / name for name in ("slider.png", "front.png", "results.json"))
    print(f"\nThe pictures: {slider} (a row for each prompt, a column for each mixture)")
    print(f"              {front} (the front between the rewards)")
    print(f"The numbers:  {numbers}")
    if results["minutes"] is not None:  # of a demo that was not interrupted
        print(f"It took {results['minutes']:.1f} minutes.")
    print("\nNext:", *next_commands(output, results), sep="\n  ")


def gains_table(results: Mapping) -> str:
    """The gain of every reward over the base at every mixture, with its interval, as a table of fixed width."""
    gains, names = results["gain_over_base"], results["objectives"]
    rewards = dict(zip(names, results["rewards"], strict=True))
    heads = [f"{name}, {unit}" if (unit := reward_unit(rewards[name])) else name for name in names]
    first = max(map(len, gains)) + 2
    rows = [[column, *(interval_text(by[name], signed=True) for name in names)] for column, by in gains.items()]
    wide = 2 + max(len(cell) for row in [heads, *(row[1:] for row in rows)] for cell in row)
    title = f"Gain over the base on {results['prompts']} held-out prompts, mean [95 % interval over prompts]:"
    lines = [" " * first + "".join(f"{head:>{wide}}" for head in heads)]
    lines += [f"{column:{first}}" + "".join(f"{cell:>{wide}}" for cell in cells) for column, *cells in rows]
    return "\n".join([title, "", *(f"  {line}" for line in lines)])


def claims(results: Mapping) -> dict[str, Mapping[str, float]]:
    """What the demo claims: the gain whose interval must be above 0 for each claim."""
    gains = results["gain_over_base"]
    alone = {f"the {name} adapter raises {name}": gains[f"{name} alone"][name] for name in results["objectives"]}
    fused = {f"fused with equal weights, {name} rises": gains["equal weights"][name] for name in results["objectives"]}
    return alone | fused


def next_commands(output: Path, results: Mapping) -> list[str]:
    """Three commands to type next: an image at other weights, the page with a slider, and a training on other rewards.

    They come after the activation of this environment, where its commands are not on the search path.
    """
    first, second, *_ = results["objectives"]
    adapter_set = str(output / "set")
    weights = f"{first}=0.3,{second}=0.7"
    sample = [
        "stepfuse",
        "sample",
        adapter_set,
        "--prompt",
        PROMPT,
        "--weights",
        weights,
        "--output",
        str(output / "fox.png"),
    ]
    install = "" if find_spec("fastapi") else "pip install 'stepfuse[serve]' && "
    other = ["{reward: warmth}", "{reward: compressibility}"]
    train = [_python(), "-m", "stepfuse.train.dpo", "--config", "dpo/emoji-flow-joint"]
    activate = Path(sys.prefix, "bin", "activate")
    found = shutil.which("stepfuse") or not activate.is_file()
    return [
        *([] if found else [f"source {shlex.quote(str(activate))}    # in every new shell"]),
        shlex.join([*sample, "--enlarge", "4"]),
        f"{install}{shlex.join(['stepfuse', 'serve', adapter_set])}    # a page with a slider for each reward",
        f"{shlex.join([*train, '--objectives', *other, '--output_dir', 'outputs/mine'])}    # other rewards, 3 minutes",
    ]


def _python() -> str:
    """The interpreter of this environment as a shell finds it: `python`, unless that is another one or not there."""
    found = shutil.which("python")
    activated = Path(sys.prefix, "bin", "activate").is_file() and not shutil.which("stepfuse")  # by the first command
    return "python" if activated or (found and Path(found).parent == Path(sys.executable).parent) else sys.executable
