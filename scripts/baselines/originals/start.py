"""Start a published reward package in an environment of its own, with random weights in its published layout."""

import gzip
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stepfuse.rewards.image_reward import VOCABULARY
from stepfuse.rewards.registry import CONFIGS
from stepfuse.rewards.worker.client import WorkerReward, WorkerSettings
from stepfuse.rewards.worker.environment import environment_python

FOLDER = Path(__file__).parent
REQUIREMENTS = {
    "image_reward": CONFIGS / "image_reward_original.txt",
    "hpsv2": FOLDER / "hpsv2.txt",
    "pickscore": CONFIGS / "image_reward_original.txt",  # which has transformers 4
}
MERGES = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's byte-pair merges, which reward packages carry
WORDS = 49152  # and two marks: 49,408 tokens are 256 bytes, each also at a word's end, these merges, and the marks


def start_original(name: str, folder: Path, *, size: str, threads: int = 1) -> WorkerReward:
    """The original of a reward; its first call writes random weights in the published layout to the folder.

    Raises:
        ValueError: where its environment cannot be made.
    """
    python = environment_python(REQUIREMENTS[name])
    example = CONFIGS / "image_reward_original.py"
    arguments: dict[str, Any] = {"name": name, "folder": str(folder), "example": str(example)}
    arguments |= {"size": size, "threads": threads}
    if name == "image_reward":
        arguments["vocabulary"] = str(VOCABULARY)
    else:
        found = [*python.parents[1].glob(f"lib/python*/site-packages/*/{MERGES}")]
        if not found:
            raise ValueError(f"no {MERGES} in {python.parents[1]}; delete that folder, and it is made again")
        write_tokenizer(found[0], folder)
    settings = WorkerSettings(
        function="original.py:Original",
        requirements=str(REQUIREMENTS[name]),
        arguments=arguments,
        batch_size=2**20,  # the original scores one image at a time
        timeout=7200,
    )
    return WorkerReward(settings, name=f"{name} as published", folder=FOLDER)


def write_tokenizer(merges: Path, folder: Path) -> None:
    """`MERGES` → tokenizer.json of transformers; OpenAI's simple_tokenizer.py says how words are numbered."""
    lines = gzip.decompress(merges.read_bytes()).decode().split("\n")[1 : WORDS - 256 - 2 + 1]
    pairs = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    folder.mkdir(parents=True, exist_ok=True)
    CLIPTokenizer(vocab=vocabulary, merges=pairs).save_pretrained(folder)
