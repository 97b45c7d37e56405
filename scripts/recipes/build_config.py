"""The configuration of `stepfuse build`. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Any, Literal

from stepfuse.data.settings_fields import check_settings, setting
from stepfuse.data.settings_file import require


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """The settings of `stepfuse build`, as YAML gives them.

    Attributes:
        output_dir: Folder that adapters, set and evaluation are written to.
        objectives: Mappings of `algorithm`, dpo or ddpo, `config`, the configuration of a training, and any settings
            that override it. One whose training has several `objectives` stands for all of them, which it trains
            together.
        oracles: The same for adapters that are trained on `weighted:` rewards.
        accelerate: Configuration of accelerate for every training. Unset, one process in float32.
        reference_eta: Eta of the base in the set.
        guidance: Guidance of the images that are sampled with the set, also in its evaluation. Unset, that of training.
        guidance_scale: Scale of that guidance. Unset, that of training.
        half: Store the weights of the set in float16.
        dtype: Precision of the base for everything but training, which has the mixed precision of accelerate.
        profile: Prompts on which the gap between soup and product is measured, for `sample --gate`. Unset, it is not
            measured.
        evaluate: Configuration of an evaluation. Unset, the set is not evaluated.
    """

    output_dir: str = "outputs/set"
    objectives: list = setting([])
    oracles: list = setting([])
    accelerate: str = ""
    reference_eta: float = setting(1.0, least=0, most=1)
    guidance: Literal["", "shared", "full", "off", "embedded"] = ""
    guidance_scale: float | None = None
    half: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    profile: str = ""
    evaluate: str = ""

    def __post_init__(self) -> None:
        check_settings(self)
        require(bool(self.objectives), "objectives", self.objectives, "a mapping of algorithm and config for each")

    @property
    def guided(self) -> dict[str, Any]:
        """The guidance of the set where it is given: what earlier builds did not have is not in their identity."""
        given = {"guidance": self.guidance or None, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in given.items() if value is not None}
