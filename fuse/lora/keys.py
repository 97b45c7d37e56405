"""Names of tensors in LoRA files: which layer, which factor, which adapter.

A key is read in two steps, before anything is decided about the layout of its file. `parse_key` splits it into the kind
of tensor, the part of the pipeline and the layer as the writing tool spells it; of a base it knows only the name of the
network. `LayerTable.find` turns that spelling into the path of a layer of one network. `written_key` names the tensors
of the files that stepfuse writes.

Sources of the spellings: diffusers (loaders/lora_conversion_utils.py, utils/state_dict_utils.py), peft
(utils/save_and_load.py), kohya-ss/sd-scripts (networks/lora.py), LyCORIS (wrapper.py), OneTrainer, SimpleTuner and
ComfyUI (comfy/lora.py).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from stepfuse.fuse.lora.names import LayerNames, Original

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CHECKPOINT = "policy"  # the first part of keys in checkpoints of a training, whose state is not an adapter
DOWN, UP, BIAS, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "alpha"
MAX_LENGTH = 500  # of a key

_ADAPTER = r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[A-Za-z0-9_-]+))?"
_FACTOR = re.compile(
    rf"(?P<stem>.+?)[._]lora(?:_linear_layer)?[._](?P<factor>down|up|A|B){_ADAPTER}(?:[._](?P<what>weight|bias))?"
)
_MAGNITUDE = re.compile(rf"(?P<stem>.+?)[._]lora_magnitude_vector{_ADAPTER}(?:\.weight)?")
_ALPHA = re.compile(r"(?P<stem>.+?)(?:[._]lora(?:[._](?:down|up|A|B)(?:\.weight)?)?)?[._]alpha")

# Tensors that are recognised and cannot be fused, by the end of their key.
_FOREIGN_KINDS = {
    r"[._]dora_scale": "a DoRA in kohya's layout, which tools compute in different ways; "
    "convert it with peft, or to a plain LoRA",
    r"[._]hada_(w\d_[ab]|t\d)": "a LoHa (hada), which is not a LoRA",
    r"[._]lokr_(w\d(_[ab])?|t\d)": "a LoKr, which is not a LoRA",
    r"[._](ia3_l|on_input)": "an IA3, which is not a LoRA",
    r"[._](oft|boft)_?\w*": "an OFT, which is not a LoRA",
    r"[._](vera_lambda|glora|vblora|fourierft|hra_u|randlora)\w*": "another kind of adapter, which is not a LoRA",
    r"\.[ab][12]\.weight": "a GLoRA, which is not a LoRA",
    r"[._]lora_mid(\.weight)?": "a CP (Tucker) decomposition with a third factor; train it without, or convert it",
    r"[._]lora_embedding_[AB]": "a LoRA of an embedding, which the network does not have",
    r"[._](diff|diff_b|set_weight)": "a difference of full weights; extract a LoRA from it first",
    r"[._][wb]_norm": "a change of normalisation layers; a LoRA has linear layers and convolutions only",
    r"[._](scalar|scale|reshape_weight)": "a setting of the layer that stepfuse does not know",
    r"\.base_layer\.(weight|bias)": "a weight of the base itself; save the adapter alone "
    "(peft.get_peft_model_state_dict)",
    r"\.(modules_to_save|original_module)\..+": "a whole layer (modules_to_save), which is not a LoRA",
    r"\.custom_diffusion\.\w+|\w+_custom_diffusion\.\w+": "Custom Diffusion, which is not a LoRA",
    r":\d+:(up|down)": "cloneofsimo's layout, which numbers layers instead of naming them; convert it",
    r"\.(weight|bias)": "full weights, not a LoRA",
}
_FOREIGN = [(re.compile(rf".*?(?:{pattern})(?:\.[A-Za-z0-9_-]+)?"), what) for pattern, what in _FOREIGN_KINDS.items()]

_WRAPPERS = "base_model|model|module|_orig_mod|diffusion_model"
_TEXT = re.compile(
    r"(?:lora[._]|lycoris[._])?"
    r"(?:te\d?|text_encoders?(?:[._]\d)?|text_model|text_projection|cond_stage_model|conditioner|clip_[lgh]|t5xxl|bundle_emb"
    r"|emb_params|string_to_(?:param|token))(?:[._].*)?"
)
_NETWORKS = ("transformer", "prior", "controlnet", "vae", "first_stage_model")


@dataclass(frozen=True, kw_only=True)
class LoRAKey:
    """A key, taken apart.

    Attributes:
        key: as it is in the file.
        of_text: the tensor is of a text encoder.
        kind: DOWN, UP, BIAS, MAGNITUDE or ALPHA; empty where the tensor is not of a LoRA.
        layer: the layer without its prefixes, as the writing tool spells it.
        flat: its dots may be written as underscores.
        adapter: peft's name of the adapter, where the key has one.
        refusal: what the tensor is of, where it cannot be fused.
    """

    key: str
    of_text: bool = False
    kind: str = ""
    layer: str = ""
    flat: bool = False
    adapter: str | None = None
    refusal: str = ""


def parse_key(key: str, names: LayerNames) -> LoRAKey:
    """Take a key apart, by the names of the network that it may be of; every key has a result."""
    stem, kind, adapter = _split(key)
    bare = _strip(stem, rf"(?:{_WRAPPERS}|{names.part})\.")
    if _TEXT.fullmatch(bare):
        return LoRAKey(key=key, kind=kind, of_text=True)
    refusal, others = "", "|".join(network for network in _NETWORKS if network != names.part)
    if key.startswith(f"{CHECKPOINT}."):
        refusal = "a training checkpoint, which does not state the scale; take the adapter that the training writes"
    elif re.fullmatch(rf"(?:lora[._]|lycoris[._])?(?:{others})[._].*", bare):
        refusal = "another network than the base's"
    elif not kind:
        refusals = (what for pattern, what in _FOREIGN if pattern.fullmatch(key))
        refusal = next(refusals, "no LoRA in a layout that stepfuse knows: it names no layer and factor")
    layer = re.sub(rf"^(?:{names.kohya_prefix.rstrip('_')}|lora_{names.part}|lycoris)[._]", "", bare)
    return LoRAKey(key=key, kind=kind, layer=layer, flat=layer != bare, adapter=adapter, refusal=refusal)


def set_key(key: str, networks: Collection[str]) -> tuple[str, str, str] | None:
    """Part, module and kind of a tensor in the file of a set, of one of these networks; None for other layouts."""
    stem, kind, adapter = _split(key)
    part, _, layer = stem.partition(".")
    if (
        part not in (*networks, *TEXT_PARTS)
        or kind in ("", ALPHA)
        or adapter is not None
        or not re.fullmatch(r"[A-Za-z0-9_.-]+", layer)
    ):
        return None
    return part, plain_path(layer), kind


def _split(key: str) -> tuple[str, str, str | None]:
    """What comes before the kind of tensor, the kind, and the adapter's name."""
    if len(key) > MAX_LENGTH or not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
        return key[:MAX_LENGTH], "", None
    if match := _FACTOR.fullmatch(key):
        down = match["factor"] in ("down", "A")
        if not (down and match["what"] == "bias"):
            kind = BIAS if match["what"] == "bias" else DOWN if down else UP
            return match["stem"], kind, match["adapter"]
    if match := _MAGNITUDE.fullmatch(key):
        return match["stem"], MAGNITUDE, match["adapter"]
    if match := _ALPHA.fullmatch(key):
        return match["stem"], ALPHA, None
    return key, "", None


def _strip(text: str, prefix: str) -> str:
    """A text without a prefix, however often it is repeated."""
    return re.sub(f"^(?:{prefix})+", "", text)


class LayerTable:
    """Layers of a network that can have a LoRA, by every spelling of their path.

    Args:
        modules: of the network, by path, without LoRAs.
        names: of its layers in other tools' files.

    Attributes:
        modules: these, and by its path each layer of the original network that is made of several, or differs.
        originals: those layers, by their path.
    """

    def __init__(self, modules: Mapping[str, nn.Module], names: LayerNames) -> None:
        self.modules, self.names, self.originals = dict(modules), names, dict[str, Original]()
        layers = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)]
        self.layers: dict[str, str] = {}
        for name in layers:
            original = names.original(name)
            if original is None:
                continue
            self.layers[original.path] = name
            if original.swapped or len(original.modules) > 1:
                joined = nn.Linear(_weight(modules[name]).shape[1], sum(self.rows(original)), device="meta")
                self.modules[original.path] = joined
                self.originals[original.path] = original
                self.layers[original.path] = original.path
        self.layers |= {name: name for name in layers}
        self.flat: dict[str, set[str]] = {}
        for spelling, name in self.layers.items():
            self.flat.setdefault(spelling.replace(".", "_"), set()).add(name)

    def rows(self, original: Original) -> list[int]:
        """The rows of the network's layers that a layer is made of."""
        return [len(_weight(self.modules[module])) for module in original.modules]

    def find(self, name: LoRAKey) -> str:
        """The path in `modules` of the layer a key is of; a ValueError unless there is one that can have a LoRA."""
        dotted = plain_path(name.layer)
        for path in (dotted, f"{dotted}.0"):  # to_out of attention processors
            if path in self.layers:
                return self.layers[path]
        flat = dotted.replace(".", "_")
        bare = _strip(flat, rf"(?:{_WRAPPERS}|{self.names.part})_")
        found = self.flat.get(flat) or self.flat.get(f"{flat}_0") or self.flat.get(bare)
        if found is None:
            for path, module in self.modules.items():
                if path and path.replace(".", "_") == flat:
                    what = f"{path}, a {type(module).__name__}"
                    raise ValueError(f"{name.key[:100]!r} is of {what}; expected a linear layer or a convolution")
            spelled = name.key.partition(".")[0] if name.flat else dotted
            raise ValueError(f"the base has no layer {spelled[:100]!r}; the LoRA is of another base")
        if len(found) > 1:
            raise ValueError(f"{name.key[:100]!r} may be of {' or of '.join(sorted(found))}; write the path with dots")
        return next(iter(found))


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def plain_path(layer: str) -> str:
    """A path without the attention processors that diffusers before peft kept LoRAs in."""
    attention = ".processor." in layer
    path = layer.replace(".processor.", ".").removesuffix(".processor")
    return f"{path}.0" if attention and path.endswith(".to_out") else path


# The files that stepfuse writes.

# Of Stable Diffusion 1.x to XL; the attention of transformers is in no `attentions`.
_ATTENTION = re.compile(r"(?P<block>.*\.attentions\..*\.attn[12])\.(?P<layer>to_[qkv]|to_out)(?:\.0)?")


def written_key(module: str, kind: str, *, guarded: bool) -> str:
    """The key of a tensor in the files that stepfuse writes, without the part.

    They are those of diffusers before peft: diffusers and ComfyUI each read every layer of them, ComfyUI the
    attention of Stable Diffusion 1.x to XL under its processor and all else by its path. Neither ComfyUI nor
    AUTOMATIC1111 knows magnitudes and biases of B; with `guarded` the keys of a file that has some are such that
    diffusers alone reads them, who drops `.processor` from any key.
    """
    leaf = {DOWN: "lora.down.weight", UP: "lora.up.weight", BIAS: "lora.up.bias", MAGNITUDE: MAGNITUDE}[kind]
    if guarded:
        return f"{module}.processor.{leaf}"
    match = _ATTENTION.fullmatch(module)
    return f"{match['block']}.processor.{match['layer']}_{leaf}" if match else f"{module}.{leaf}"
