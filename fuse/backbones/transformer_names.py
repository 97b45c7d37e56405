"""Names of a transformer's layers in the model's own repository, which kohya's files and ComfyUI take theirs from.

What a family states of itself are two tables from diffusers' layers to those there. Layers that are one there, such as
the queries, keys and values of an attention, have the same name in a table, in the order of their rows.

Sources: diffusers (loaders/single_file_utils.py), kohya-ss/sd-scripts and kohya-ss/musubi-tuner (networks/lora*.py and
the models beside them, sai_model_spec.py), ComfyUI (comfy/lora.py, comfy/utils.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stepfuse.fuse.lora.names import LayerNames, Original


@dataclass(frozen=True, kw_only=True)
class TransformerNames(LayerNames):
    """Names of a transformer's layers.

    Attributes:
        config: of the transformer.
        outside: layers outside its blocks, and what they are there.
        blocks: lists of blocks; what each is there, and the layers of one of its blocks.
        swapped: layers of a scale and a shift, in this order, that are shift and scale there.
        network_module: of the training script, as its files state it.
    """

    part: str = "transformer"
    kohya_prefix: str = "lora_unet_"
    one_alpha: ClassVar[bool] = False
    config: Mapping[str, Any]
    outside: ClassVar[Mapping[str, str]] = {}
    blocks: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {}
    swapped: ClassVar[Sequence[str]] = ()
    network_module: ClassVar[str] = ""

    @property
    def model(self) -> tuple[str, str]:
        """The model as kohya's files state it: `ss_base_model_version` and `modelspec.architecture`."""
        return "", ""

    def rows(self, layer: str) -> int:
        """The outputs of a layer of a block that is joined with others."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    def original(self, module: str) -> Original | None:
        swapped = module in self.swapped
        if module in self.outside:
            return Original(path=self.outside[module], modules=(module,), swapped=swapped)
        block, number, layer = (*module.split(".", 2), "", "")[:3]
        there, layers = self.blocks.get(block, ("", {}))
        if layer not in layers:
            return None
        joined = [name for name, path in layers.items() if path == layers[layer]]
        return Original(
            path=f"{there}.{number}.{layers[layer]}",
            modules=tuple(f"{block}.{number}.{name}" for name in joined),
            rows=tuple(self.rows(name) for name in joined) if len(joined) > 1 else (),
            swapped=swapped,
        )

    def in_kohya(self, module: str) -> Original:
        found = self.original(module)
        if found is None:
            raise ValueError(
                f"layer {module!r} has no name in kohya's files of {self.family}; export diffusers' format"
            )
        return found

    def kohya_metadata(self, *, title: str, rank: int, alpha: float, prediction: str) -> dict[str, str]:
        version, architecture = self.model
        return super().kohya_metadata(title=title, rank=rank, alpha=alpha, prediction=prediction) | {
            "ss_network_module": self.network_module,
            "ss_base_model_version": version,
            "modelspec.architecture": f"{architecture}/lora",
        }
