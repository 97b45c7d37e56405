"""Names of a network's layers in the LoRA files of other tools."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Original:
    """A layer as other tools have it, who build a network as its authors did and not as diffusers does.

    Attributes:
        path: of the layer there.
        modules: the layers of diffusers' network whose weights are its rows, from the first row on.
        rows: of each of them, where there are several.
        swapped: its first half of rows is the second in diffusers', as scale and shift before a last layer are.
    """

    path: str
    modules: tuple[str, ...]
    rows: tuple[int, ...] = ()
    swapped: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Names of a network's layers in other tools' files; a model family that has some there overrides these methods.

    Attributes:
        part: the prefix of keys in diffusers' files, which is the pipeline's name of the network.
        kohya_prefix: of keys in files of kohya-ss/sd-scripts.
        family: what users call the model family, one of `stepfuse.fuse.lora.families`; empty for others.
        one_alpha: in kohya's files all layers have the same alpha, for diffusers confuses those of such networks.
    """

    part: str
    kohya_prefix: str
    family: ClassVar[str] = ""
    one_alpha: ClassVar[bool] = True

    @classmethod
    def of(cls, part: str) -> "LayerNames":
        """Those of a network that has no other names than diffusers'."""
        return LayerNames(part=part, kohya_prefix=f"lora_{part}_")

    def original(self, module: str) -> Original | None:
        """The layer of the model's original repository that a layer's weights are in; None where there is none."""
        return None

    def in_kohya(self, module: str) -> Original:
        """The layer of kohya's files that a layer's weights are in; ValueError for a layer that has no name there."""
        return Original(path=module, modules=(module,))

    def kohya(self, module: str) -> str:
        """The name in kohya's files of the layer that a layer's weights are in; see `in_kohya`."""
        return self.kohya_prefix + self.in_kohya(module).path.replace(".", "_")

    def kohya_metadata(self, *, title: str, rank: int, alpha: float, prediction: str) -> dict[str, str]:
        """What kohya's files state of themselves."""
        return {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(alpha),
            "ss_output_name": title,
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.title": title,
        }
