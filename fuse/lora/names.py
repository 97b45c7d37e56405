"""Names of a network's layers in the LoRA files of other tools."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Names of a network's layers in other tools' files; a model family that has some there overrides these methods.

    Attributes:
        part: the prefix of keys in diffusers' files, which is the pipeline's name of the network.
        kohya_prefix: of keys in files of kohya-ss/sd-scripts.
    """

    part: str
    kohya_prefix: str

    @classmethod
    def of(cls, part: str) -> "LayerNames":
        """Those of a network that has no other names than diffusers'."""
        return LayerNames(part=part, kohya_prefix=f"lora_{part}_")

    def original(self, module: str) -> str | None:
        """The path of a layer in the model's original repository; None where it has none."""
        return None

    def kohya(self, module: str) -> str:
        """The name of a layer in kohya's files; ValueError for a layer that has none there."""
        return self.kohya_prefix + module.replace(".", "_")

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
