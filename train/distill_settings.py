"""Settings of distillation, and those that its set decides. Importing this module does not import torch."""

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from stepfuse.data.settings_fields import setting
from stepfuse.data.settings_file import require
from stepfuse.train.joint_settings import objective_settings
from stepfuse.train.policy_settings import LoRASettings, VarianceSettings
from stepfuse.train.run_settings import BaseModelSettings, RewardSettings
from stepfuse.train.settings import TrainSettings

if TYPE_CHECKING:
    from stepfuse.fuse.sets.adapter_set import AdapterSet

OTHERS = (  # besides those of the base model, the rewards, the LoRA and the schedules
    *("objectives", "init_set", "train_rule", "sample_num_steps", "sample_guidance_scale", "guidance", "resolution"),
    *("vertex_turns", "skip_first_steps", "skip_last_steps", "beta", "log_prob_reduction", "variance_learning_rate"),
    *("max_kl", "load_best_model_at_end", "min_diversity"),
)


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainSettings):
    """Distillation: the soup of copies of the adapters is fitted to the product of the adapters, without rewards.

    Attributes:
        adapter_set: Adapter set whose product is distilled: a folder, a hub id, `emoji-flow` or `emoji`. It decides the
            base model, the guidance, the denoising steps, the variance schedules and the names of the objectives.
    """

    program: ClassVar[str] = "distill"
    description: ClassVar[str] = "Distil the product of a set's adapters into their soup, which is one network."
    example: ClassVar[str] = "distill/emoji"
    positional: ClassVar[str] = "adapter_set"
    fixed: ClassVar[frozenset[str]] = frozenset(
        [
            *OTHERS,
            *(
                field.name
                for kind in (BaseModelSettings, RewardSettings, LoRASettings, VarianceSettings)
                for field in fields(kind)
                if field.name != "mixed_precision"
            ),
        ]
    )

    adapter_set: str = ""
    num_validation_images: int = setting(16, least=1)

    def check_together(self) -> None:
        require(
            self.adapter_set != "", "adapter_set", repr(self.adapter_set), "a folder, a hub id, emoji-flow, or emoji"
        )


def with_set(settings: DistillSettings, adapter_set: "AdapterSet") -> DistillSettings:
    """The settings with what the set decides.

    Raises:
        ValueError: for a set of one adapter, and for a setting, as of another run's configuration, that the set decides
            otherwise.
    """
    if len(adapter_set.adapters) == 1:
        raise ValueError(
            f"set {settings.adapter_set} has one adapter, {adapter_set.names[0]!r}, whose soup is the product; distil "
            "a set of two or more"
        )
    base = adapter_set.base
    decided: dict[str, Any] = {
        "pretrained_model_name_or_path": base["name_or_path"],
        **{name: base.get(name) for name in ("revision", "variant", "max_sequence_length", "resolution")},
        "objectives": [objective_settings(objective) for objective in adapter_set.objectives],
        "guidance": adapter_set.guidance,
        "sample_guidance_scale": adapter_set.guidance_scale,
        "sample_num_steps": adapter_set.num_inference_steps,
    }
    complete = replace(settings, **decided)
    defaults = asdict(DistillSettings(adapter_set=settings.adapter_set))
    for name in sorted(settings.fixed):
        given, right = getattr(settings, name), getattr(complete, name)
        if given != defaults[name]:
            expected = f"{right!r}, as of set {settings.adapter_set}" if name in decided else "it unset in distillation"
            require(name in decided and given == right, name, given, expected)
    return complete
