"""Starting from the adapters of a set in place of new ones (`init_set`), so that further training refines them."""

from dataclasses import replace
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft.utils import set_peft_model_state_dict

from stepfuse.data.names import nearest
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.fuse.lora.factors import peft_state
from stepfuse.fuse.sampling.rewards import check_trusted
from stepfuse.fuse.sets.adapter import load_adapter, read_factors
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.train.joint_settings import objective_settings
from stepfuse.train.provenance import provenance
from stepfuse.train.settings import TrainSettings


def resolve_objectives(settings: TrainSettings) -> tuple[TrainSettings, AdapterSet | None]:
    """The set that a run starts from, and the settings, which take the objectives of the set if they name none.

    Raises:
        ValueError: for a faulty set, one of another base or that lacks an objective, and a set that names a reward
            which is code or a server.
    """
    if not settings.init_set:
        return settings, None
    loaded = load_set(settings.init_set)
    if not settings.objectives and not settings.objective_name and len(loaded.adapters) > 1:
        for objective in loaded.objectives:
            if not objective.reward:
                raise ValueError(
                    f"init_set {settings.init_set}: {objective.name!r} names no reward; give the objectives of the run"
                )
            _check_own_reward(settings, objective)
        settings = replace(settings, objectives=[_entry(settings, adapter) for adapter in loaded.adapters])
    for each in settings.each:
        if each.name not in loaded.names:
            known = f"it has {', '.join(loaded.names)}{nearest(each.name, loaded.names)}"
            raise ValueError(f"init_set {settings.init_set} has no adapter {each.name!r}; {known}")
        _check_training(settings, each, adapter_of(loaded, each.name))
    return settings, loaded


def _check_training(settings: TrainSettings, each: TrainSettings, adapter: Adapter) -> None:
    """Raise ValueError for guidance that an adapter was not trained with, and for a schedule that cannot be trained."""
    own = Guidance(source=each.guidance, scale=each.sample_guidance_scale)
    trained = Guidance(source=adapter.guidance, scale=adapter.guidance_scale)
    if str(own) != str(trained):
        raise ValueError(
            f"guidance is {own}; expected {trained}, as {adapter.name!r} of init_set {settings.init_set} was trained "
            "with (guidance and sample_guidance_scale)"
        )
    each.check_trained_variance(bool(adapter.objective.variance.trainable()))


def _check_own_reward(settings: TrainSettings, objective: Any) -> None:
    try:
        check_trusted(objective, trusted=False)
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ValueError(f"{reason}; if you trust it, name it in the objectives of the run") from error


def _entry(settings: TrainSettings, adapter: Adapter) -> dict[str, Any]:
    """The settings of an objective, as its adapter's training had them; beta if that was by the same algorithm."""
    record = adapter.record
    beta = record.get("config", {}).get("beta")
    own = {"beta": beta} if beta and record.get("algorithm") == settings.algorithm else {}
    entry = objective_settings(adapter.objective)
    del entry["beta"]  # that of the objective is a temperature
    return entry | own


def adapter_of(loaded: AdapterSet, name: str) -> Adapter:
    return loaded.adapters[loaded.names.index(name)]


def initial_schedules(settings: TrainSettings, loaded: AdapterSet | None) -> list[VarianceSchedule]:
    """The schedules that training starts from: those of the settings, or of the set's adapters."""
    if loaded is None:
        return [each.initial_schedule() for each in settings.each]
    return [adapter_of(loaded, each.name).objective.variance for each in settings.each]


def add_adapter_of_set(backbone: Backbone, adapter: Adapter) -> None:
    """Put an adapter of a set on the network, in float32, to be trained."""
    network: Any = backbone.network
    load_adapter(backbone, adapter, base_fingerprint(network))
    if backbone.network.dtype != torch.float32:  # it was rounded to the precision of the base
        cast_training_params(network, dtype=torch.float32)
        _, factors = read_factors(adapter)
        set_peft_model_state_dict(network, peft_state(factors), adapter_name=adapter.name)


def init_record(settings: TrainSettings, loaded: AdapterSet | None) -> dict[str, str]:
    """The SHA-256 of each adapter that a run started from, by SET/NAME."""
    if loaded is None:
        return {}
    return {f"{settings.init_set}/{each.name}": adapter_of(loaded, each.name).sha256 for each in settings.each}


def run_hash(settings: TrainSettings) -> str:
    """The `config_sha256` of a run with these settings, which depends on the adapters that it starts from."""
    settings, loaded = resolve_objectives(settings)
    return provenance(settings, init_record(settings, loaded))["config_sha256"]
