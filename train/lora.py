"""The policy: a base model with a LoRA and a variance schedule for each objective, which are trained."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from stepfuse.data.names import nearest
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.denoiser import Router
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.fuse.lora.layers import active_adapter, adapter_on_last_rows, lora_layers, several_adapters
from stepfuse.fuse.lora.mixture import BASE, Network
from stepfuse.fuse.lora.rows import AdapterRows

VARIANCE = "variance_"  # before the names of the schedule's parameters in a checkpoint


class Policy(nn.Module):
    """The trainable module: a network with a LoRA for each objective, and the trainable parameters of their schedules.

    Its forward returns these parameters too, a mapping for each objective, so that a distributed wrapper sees every
    parameter used.

    Args:
        adapters: names of the LoRAs.
        schedules: the variance schedule of each.
        rows: runs several LoRAs, each row with weights of its own; not needed for one.
        trains_schedules: False to leave the schedules as they are.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[str],
        schedules: Sequence[VarianceSchedule],
        rows: AdapterRows | None = None,
        *,
        trains_schedules: bool = True,
    ) -> None:
        super().__init__()
        self.backbone, self.network, self.rows = backbone, backbone.network, rows
        self.adapters = tuple(adapters)
        several = len(self.adapters) > 1
        trained = [schedule.trainable() if trains_schedules else {} for schedule in schedules]
        # By objective, the name of each parameter of its schedule here.
        self.schedule_names = [
            {name: f"{name}_{adapter}" if several else name for name in parameters}
            for adapter, parameters in zip(adapters, trained, strict=True)
        ]
        for names, parameters in zip(self.schedule_names, trained, strict=True):
            for name, value in parameters.items():
                self.register_parameter(names[name], nn.Parameter(value.clone()))
        self.register_load_state_dict_pre_hook(_rename_part)

    def forward(
        self, x: Tensor, times: Tensor, weights: Tensor | None = None, **inputs: Tensor
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The prediction, with the one LoRA, or with these weights of the LoRAs for each row."""
        if self.rows is None:
            with active_adapter(self.network, self.adapters[0]):
                output = self.backbone.predict(x, times, inputs, network=self.network)
        else:
            # They stay until the next forward: gradient checkpointing runs the layers again in the backward pass.
            self.rows.route = weights
            output = self.backbone.predict(x, times, inputs, network=self.network)
        # Not the parameters themselves: with ZeRO-3 they may be partitioned again after this forward.
        return output, [{name: value * 1 for name, value in each.items()} for each in self.schedule_parameters()]

    def schedule_parameters(self) -> list[dict[str, nn.Parameter]]:
        """The trainable parameters of each objective's schedule by name."""
        return [{name: self.get_parameter(own) for name, own in names.items()} for names in self.schedule_names]

    def trainable_state(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LoRA tensors in peft's names and the schedules' parameters, from trainable values by their names here.

        Of several objectives each name begins with that of its objective and a slash.
        """
        own = {name for names in self.schedule_names for name in names.values()}
        lora = {name.removeprefix("network."): value for name, value in values.items() if name not in own}
        state: dict[str, Tensor] = {}
        for adapter, names in zip(self.adapters, self.schedule_names, strict=True):
            mine = dict(get_peft_model_state_dict(self.network, state_dict=lora, adapter_name=adapter))
            mine |= {VARIANCE + name: values[held] for name, held in names.items()}
            state |= {f"{self._prefix(adapter)}{name}": value for name, value in mine.items()}
        return state

    def check_objectives(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError for a `trainable_state` of other objectives."""
        known = sorted({name.partition("/")[0] for name in state if "/" in name})
        expected = sorted(self.adapters) if len(self.adapters) > 1 else []
        if known != expected:
            was, now = (", ".join(names) or "one objective" for names in (known, expected))
            raise ValueError(f"the checkpoint has trained {was}, and the settings have {now}; resume with the same")

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `trainable_state`."""
        for adapter, parameters in zip(self.adapters, self.schedule_parameters(), strict=True):
            lora, values = split_state(self.state_of(adapter, state))
            set_peft_model_state_dict(self.network, lora, adapter_name=adapter)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(values[name])

    def state_of(self, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a `trainable_state` that is of one objective."""
        prefix = self._prefix(adapter)
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def _prefix(self, adapter: str) -> str:
        return f"{adapter}/" if len(self.adapters) > 1 else ""


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The LoRA tensors of a `trainable_state`, and the schedule's parameters by name."""
    lora = {name: value for name, value in state.items() if not name.startswith(VARIANCE)}
    return lora, {name.removeprefix(VARIANCE): value for name, value in state.items() if name not in lora}


def add_lora(network: nn.Module, name: str, *, rank: int, alpha: int | None, targets: list[str], seed: int) -> None:
    """Add a new float32 LoRA to a network; its B is zero, so that the policy starts as the base.

    Raises:
        ValueError: if no layer of the network matches the targets, and for a rank that a layer cannot have.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(targets))
    matched = [(path, layer) for path, layer in network.named_modules() if check_target_module_exists(config, path)]
    if not matched:
        known = _layer_names(network)
        raise ValueError(
            f"lora_target_modules {' '.join(targets)}: no layer of the model has such a name; it has, among others, "
            f"{', '.join(known[:6])}{nearest(targets[0], known)}"
        )
    for path, layer in matched:
        if isinstance(layer, nn.Conv2d) and rank % layer.groups:
            raise ValueError(
                f"rank {rank} for {path}; expected a multiple of its {layer.groups} groups, or lora_target_modules "
                "without it"
            )
    with torch.random.fork_rng(devices=[]), several_adapters():
        torch.manual_seed(seed)
        cast(Any, network).add_adapter(config, adapter_name=name)
    cast_training_params(network, dtype=torch.float32)


def _layer_names(network: nn.Module) -> list[str]:
    """How the linear layers and convolutions of a network end, `to_q` and `to_out.0`, the most frequent first."""
    ends: Counter[str] = Counter()
    for path, layer in network.named_modules():
        parts = path.removesuffix(".base_layer").split(".")  # of a layer that has another LoRA
        if isinstance(layer, nn.Linear | nn.Conv2d) and not {"lora_A", "lora_B"} & set(parts):
            start = max(index for index, part in enumerate(parts) if not part.isdigit())
            ends[".".join(parts[start:])] += 1
    return [name for name, _ in ends.most_common()]


def train_all(network: nn.Module, names: Sequence[str]) -> None:
    """Let the LoRAs of all these adapters be trained; peft lets the one that was added last."""
    for layer in lora_layers(network):
        for factors in (layer.lora_A, layer.lora_B):
            for name in names:
                if name in factors:
                    factors[name].requires_grad_(True)


@dataclass(frozen=True)
class SharedForward(Router):
    """Base and policy in one forward pass, without gradients, with the LoRA's present weights."""

    network: nn.Module
    adapter: str

    def route_of(self, networks: Sequence[Network], device: torch.device) -> int:
        """The number of rows of the base, which come first; another network is a ValueError."""
        policy = Network.of(self.adapter)
        if others := set(networks) - {BASE, policy}:
            names = sorted(str(network.adapter) for network in others)
            raise ValueError(f"adapters {names}; expected {self.adapter!r} and the base only")
        return list(networks).index(policy) if policy in networks else len(networks)

    def routed(self, route: int) -> AbstractContextManager[None]:
        return adapter_on_last_rows(self.network, self.adapter, route)


def _rename_part(policy: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Take the names of parameters in DeepSpeed's checkpoints of stepfuse 0.1, which began with the pipeline's part."""
    prefix = f"{cast(Policy, policy).backbone.part}."
    for name in [name for name in state if name.startswith(prefix)]:
        state["network." + name.removeprefix(prefix)] = state.pop(name)
