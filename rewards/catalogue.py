"""The rewards that are loaded by name. Nothing here imports torch: a reward's file is imported when it is used."""

from typing import TYPE_CHECKING

from stepfuse.data.registry import Registry

if TYPE_CHECKING:
    from stepfuse.rewards.named_reward import NamedReward

REWARDS: "Registry[NamedReward]" = Registry(
    {
        "clip_score": "stepfuse.rewards.clip_score:CLIP_SCORE",
        "colourfulness": "stepfuse.rewards.colourfulness:COLOURFULNESS",
        "compressibility": "stepfuse.rewards.compressibility:COMPRESSIBILITY",
        "contrast": "stepfuse.rewards.contrast:CONTRAST",
        "emoji_background": "stepfuse.rewards.emoji_background:EMOJI_BACKGROUND",
        "hpsv2": "stepfuse.rewards.hpsv2:HPSV2",
        "hpsv2.1": "stepfuse.rewards.hpsv2:HPSV2_1",
        "hpsv3": "stepfuse.rewards.registry:HPSV3",
        "image_reward": "stepfuse.rewards.image_reward:IMAGE_REWARD",
        "image_reward_original": "stepfuse.rewards.registry:IMAGE_REWARD_ORIGINAL",
        "incompressibility": "stepfuse.rewards.compressibility:INCOMPRESSIBILITY",
        "laion_aesthetic": "stepfuse.rewards.laion_aesthetic:LAION_AESTHETIC",
        "lightness": "stepfuse.rewards.lightness:LIGHTNESS",
        "ocr": "stepfuse.rewards.ocr:OCR",
        "pickscore": "stepfuse.rewards.pickscore:PICKSCORE",
        "subject_size": "stepfuse.rewards.subject_size:SUBJECT_SIZE",
        "symmetry": "stepfuse.rewards.symmetry:SYMMETRY",
        "vila": "stepfuse.rewards.registry:VILA",
        "warmth": "stepfuse.rewards.warmth:WARMTH",
        "weighted": "stepfuse.rewards.registry:WEIGHTED",
    }
)
