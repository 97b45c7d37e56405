"""What there is to know of each reward before it is loaded: `stepfuse reward list`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from stepfuse.rewards import hpsv2, image_reward, laion_aesthetic, pickscore
from stepfuse.rewards.clip import TOKENIZER
from stepfuse.rewards.published import Published
from stepfuse.rewards.worker.environment import COMPLETE, environment_folder

CONFIGS = Path(__file__).parents[1] / "configs" / "rewards"


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """One line of the list.

    Attributes:
        source: the paper, or where it comes from.
        licence: of the weights, or of the code where there are none.
        differentiable: in the pixels, so that `rgg` can use it.
        weights: bytes of its networks in memory, in float32.
        files: what is downloaded at first use.
        requirements: of the environment that is made at first use.
        needs: what has to be given.
    """

    source: str
    licence: str
    differentiable: bool
    weights: int = 0
    files: tuple[Published, ...] = ()
    requirements: Path | None = None
    needs: str = ""

    @property
    def download(self) -> int:
        """Bytes at first use, where they are published; an environment's packages not counted."""
        return sum(file.size for file in self.files)

    def state(self) -> str:
        """Ready, or what will happen at first use."""
        if self.needs:
            return self.needs
        missing = [file for file in self.files if not _cached(file)]
        if missing:
            return f"downloads {size_label(sum(file.size for file in missing))} at first use"
        if self.requirements is not None and not (environment_folder(self.requirements) / COMPLETE).is_file():
            return f"makes an environment of {self.requirements.name} at first use"
        return "ready"


OURS = "stepfuse"
CATALOGUE: dict[str, RewardInfo] = {
    "clip_score": RewardInfo(
        source="arXiv:2104.08718; by default the emoji base's CLIP, or clip_score:HUB_ID",
        licence="Apache-2.0; of a hub id, its own",
        differentiable=True,
        weights=14_000_000,
    ),
    "colourfulness": RewardInfo(source="Hasler and Süsstrunk 2003", licence="Apache-2.0", differentiable=True),
    "compressibility": RewardInfo(source="arXiv:2305.13301", licence="Apache-2.0", differentiable=False),
    "emoji_background": RewardInfo(source=OURS, licence="Apache-2.0", differentiable=True),
    "hpsv2": RewardInfo(
        source="arXiv:2306.09341, xswu/HPSv2",
        licence="Apache-2.0",
        differentiable=True,
        weights=3_944_000_000,
        files=(hpsv2.VERSIONS["2"], TOKENIZER),
    ),
    "hpsv2.1": RewardInfo(
        source="arXiv:2306.09341, xswu/HPSv2",
        licence="Apache-2.0",
        differentiable=True,
        weights=3_944_000_000,
        files=(hpsv2.VERSIONS["2.1"], TOKENIZER),
    ),
    "image_reward": RewardInfo(
        source="arXiv:2304.05977, THUDM/ImageReward",
        licence="Apache-2.0",
        differentiable=True,
        weights=1_786_000_000,
        files=(image_reward.CHECKPOINT, image_reward.MED_CONFIG),
    ),
    "image_reward_original": RewardInfo(
        source="image-reward 1.5 in an environment of its own; it downloads 1.8 GB by itself",
        licence="Apache-2.0",
        differentiable=False,
        weights=1_786_000_000,
        requirements=CONFIGS / "image_reward_original.txt",
    ),
    "incompressibility": RewardInfo(source="arXiv:2305.13301", licence="Apache-2.0", differentiable=False),
    "laion_aesthetic": RewardInfo(
        source="christophschuhmann/improved-aesthetic-predictor on openai/clip-vit-large-patch14",
        licence="Apache-2.0 (head), MIT (CLIP)",
        differentiable=True,
        weights=1_216_000_000,
        files=(laion_aesthetic.CONFIG, laion_aesthetic.WEIGHTS, laion_aesthetic.HEAD),
    ),
    "pickscore": RewardInfo(
        source="arXiv:2305.01569, yuvalkirstain/PickScore_v1",
        licence="not stated for the weights; MIT for its code",
        differentiable=True,
        weights=3_944_000_000,
        files=(pickscore.CONFIG, pickscore.WEIGHTS, TOKENIZER),
    ),
    "vila": RewardInfo(
        source="arXiv:2303.14302, google/vila/image/1 of TensorFlow Hub, which an environment of its own downloads",
        licence="Apache-2.0 by the hub's default",
        differentiable=False,
        requirements=CONFIGS / "vila.txt",
    ),
    "weighted": RewardInfo(
        source="a sum of others, weighted:0.5*compressibility/0.2 + 0.5*clip_score/6",
        licence="those of its terms",
        differentiable=True,
        needs="its terms",
    ),
}


def size_label(size: int) -> str:
    """Bytes as people write them."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2g} {name}"
    return f"{size} B" if size else "–"


def table(infos: dict[str, RewardInfo], state: Callable[[RewardInfo], str] = RewardInfo.state) -> list[tuple[str, ...]]:
    """Rows of `stepfuse reward list`, its heading first."""
    heading = ("reward", "gradient", "download", "in memory", "at first use", "licence", "source")
    rows = [
        (
            name,
            "yes" if info.differentiable else "no",
            size_label(info.download),
            size_label(info.weights),
            state(info),
            info.licence,
            info.source,
        )
        for name, info in infos.items()
    ]
    return [heading, *rows]


def _cached(file: Published) -> bool:
    return isinstance(try_to_load_from_cache(file.repo, file.name, revision=file.revision), str)
