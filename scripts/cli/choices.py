"""Names that the commands accept, known without importing torch.

`tests/test_arguments.py` compares each with the dictionary that defines it.
"""

from pathlib import Path

from stepfuse import data

RULE_NAMES = (  # fuse/rules/registry.py, RULES
    "base",
    "product",
    "average_noise",
    "kl",
    "switch",
    "systematic",
    "soup",
    "soup_factors",
    "code",
    "rgg",
    "oracle",
)
RULE_OPTIONS = {"product": ("gate",), "code": ("candidates", "block_size")}  # those that `sample` has as flags
BENCHMARK_RULES = tuple(name for name in RULE_NAMES if name not in ("base", "kl", "oracle", "code", "rgg"))
BASELINES = ("separate", "diffusion_blend", "set_adapters", "mixed_batch")  # scripts/benchmark/ways.py, WAYS
COMPILE_MODES = (  # scripts/benchmark/ways.py, MODES
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
)
REWARD_NAMES = (  # rewards/registry.py, REWARDS
    "clip_score",
    "colourfulness",
    "compressibility",
    "emoji_background",
    "hpsv2",
    "hpsv2.1",
    "image_reward",
    "image_reward_original",
    "incompressibility",
    "laion_aesthetic",
    "pickscore",
    "vila",
    "weighted",
)
ORIGINAL_REWARDS = ("image_reward", "hpsv2", "pickscore")  # scripts/benchmark/rewards.py, OURS
PROMPT_SET_NAMES = (  # data/prompts.py, PROMPT_SETS
    "emoji",
    "emoji-heldout",
    "colours",
    "colours-heldout",
    "dpok",
    "partiprompts",
    "pick-a-pic",
    "pick-a-pic-heldout",
)
EMBEDDED_SETS = {"emoji": Path(data.__file__).parent / "emoji-set"}  # fuse/sets/adapter_set.py, EMBEDDED_SETS
ALGORITHMS = ("ddpo", "dpo")
MODELS = ("emoji", "sd15", "sdxl")  # scripts/benchmark/training_ways.py, MODELS
GUIDANCE = ("shared", "full", "off")  # fuse/sets/adapter.py, GUIDANCE
DTYPES = ("float32", "float16", "bfloat16")
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "npu", "mlu", "musa", "xla")
