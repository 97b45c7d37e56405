"""Names of a UNet's layers in kohya's files, which ComfyUI and AUTOMATIC1111 read.

SD 1.x and 2.x: `lora_unet_` and diffusers' path, its dots underscores. SDXL: the path in Stability's own UNet (sgm),
whose blocks are numbered through. Both are kohya-ss/sd-scripts' (networks/lora.py, library/sdxl_model_util.py). For
reading them see `stepfuse.fuse.lora.keys`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stepfuse.fuse.lora.families import STABLE_DIFFUSION
from stepfuse.fuse.lora.names import LayerNames, Original

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True, kw_only=True)
class UNetNames(LayerNames):
    """Names of a UNet's layers.

    Attributes:
        config: of the UNet; the numbers of Stability's blocks depend on it.
    """

    part: str = "unet"
    kohya_prefix: str = "lora_unet_"
    family: ClassVar[str] = STABLE_DIFFUSION
    config: Mapping[str, Any]

    @property
    def is_sdxl(self) -> bool:
        return self.config.get("addition_embed_type") == "text_time"

    def original(self, module: str) -> Original | None:
        try:
            return Original(path=sgm_path(module, self.config), modules=(module,))
        except ValueError:
            return None

    def in_kohya(self, module: str) -> Original:
        return Original(path=sgm_path(module, self.config) if self.is_sdxl else module, modules=(module,))

    def kohya_metadata(self, *, title: str, rank: int, alpha: float, prediction: str) -> dict[str, str]:
        """Without it AUTOMATIC1111 takes a file for one of SD 1.x, and hides it."""
        velocity = prediction == "v_prediction"
        if self.is_sdxl:
            version, second, architecture = "sdxl_base_v1-0", False, "stable-diffusion-xl-v1-base"
        elif self.config.get("cross_attention_dim") == 1024:
            version, second = "sd_v2" + "_v" * velocity, True
            architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
        else:
            version, second, architecture = "sd_v1" + "_v" * velocity, False, "stable-diffusion-v1"
        family = {
            "ss_base_model_version": version,
            "ss_v2": str(second),
            "modelspec.architecture": f"{architecture}/lora",
        }
        return super().kohya_metadata(title=title, rank=rank, alpha=alpha, prediction=prediction) | family


def sgm_path(module: str, config: Mapping[str, Any]) -> str:
    """diffusers' path of a layer → that in Stability's UNet, where it has one; a ValueError for other layers."""
    if module in OUTSIDE:
        return OUTSIDE[module]
    layers = config["layers_per_block"]
    block, *rest = module.split(".")

    try:
        level = int(rest.pop(0)) if block != "mid_block" else 0
        kind, number, *rest = rest
        index = int(number)
        inner = ".".join(rest)
        if kind == "resnets":
            inner = RESNET[inner]
        if (block, kind) == ("mid_block", "resnets"):
            return f"middle_block.{2 * index}.{inner}"
        if (block, kind) == ("mid_block", "attentions"):
            return f"middle_block.1.{inner}"
        if block == "down_blocks" and kind in ("resnets", "attentions"):
            return f"input_blocks.{1 + _blocks_before(level, layers) + index}.{int(kind == 'attentions')}.{inner}"
        if (block, kind, inner) == ("down_blocks", "downsamplers", "conv"):
            return f"input_blocks.{_blocks_before(level + 1, layers)}.0.op"
        if block == "up_blocks" and kind in ("resnets", "attentions"):
            return f"output_blocks.{_blocks_before(level, layers, up=True) + index}.{int(kind == 'attentions')}.{inner}"
        if (block, kind, inner) == ("up_blocks", "upsamplers", "conv"):
            attends = "CrossAttn" in config["up_block_types"][level]
            return f"output_blocks.{_blocks_before(level + 1, layers, up=True) - 1}.{2 if attends else 1}.conv"
    except (ValueError, KeyError, IndexError):
        pass
    raise ValueError(f"layer {module!r} has no name in kohya's files of SDXL; export diffusers' format")


def _blocks_before(level: int, layers: int | Sequence[int], *, up: bool = False) -> int:
    """The blocks of all levels before one, with as many layers each, or as the UNet lists them on its way down."""
    if isinstance(layers, int):
        return (layers + 1) * level
    return sum(list(layers)[:: -1 if up else 1][:level]) + level
