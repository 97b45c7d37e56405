"""The adapter sets that a server draws, on one base."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stepfuse.data import emoji
from stepfuse.data.prompts import load_prompts
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.rules.gap_profile import profile_to_dict
from stepfuse.fuse.rules.registry import RULES, get_default_rule, is_user_code
from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.rules.weights import Weights, WeightSchedule, parse_weights
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.fuse.sets.entries import objective_to_dict
from stepfuse.fuse.sets.hub import parse_id
from stepfuse.fuse.sets.set_name import set_name
from stepfuse.rewards.registry import reward_unit

EXAMPLES = ("a fox on a green background", "a red apple on a blue background", "a cat face on a purple background")


@dataclass(frozen=True, kw_only=True)
class ServedSet:
    """A set as clients see it, and its sampler.

    Several sets of one base may have objectives of one name: on the network, and for the sampler, those of the second
    set end in `__2`, and so on.

    Attributes:
        name: the `model` of requests.
        source: what others load it by: a hub's id, a bundled set, or a path relative to where the server was started;
            of other folders only the name, since clients need not know where they are.
        loaded: the set, with its objectives' own names.
        sampler: with the names on the network.
        suffix: of these.
    """

    name: str
    source: str
    loaded: AdapterSet
    sampler: FusedSampler
    suffix: str

    @cached_property
    def rules(self) -> list[str]:
        """The fusion rules that can be asked for: those that need no rewards."""
        accepted = [name for name, rule in RULES.items() if not rule.needs]
        return [name for name in accepted if name != "oracle" or self.loaded.oracles]

    def inner(self, weights: Weights) -> dict[str, float | WeightSchedule]:
        """Weights by the names on the network."""
        return {f"{name}{self.suffix}": weight for name, weight in weights.items()}

    def outer(self, message: str) -> str:
        """A message of the sampler with the objectives' own names, and without paths of this machine."""
        for name in self.loaded.names:
            message = message.replace(f"{name}{self.suffix}", name)
        for path in {self.loaded.adapters[0].folder.parent, Path(self.loaded.base["name_or_path"]), Path.home()}:
            if path.is_absolute():
                message = message.replace(str(path), path.name)
        return message

    def describe(self) -> dict[str, Any]:
        """The set's entry of `GET /v1/sets`."""
        loaded, backbone = self.loaded, self.sampler.backbone
        height, width = backbone.size()
        base = loaded.base["name_or_path"]
        public = base in emoji.BASES or (parse_id(base) is not None and not Path(base).exists())
        return {
            "name": self.name,
            "id": _identity(loaded),
            "source": self.source,
            "base": base if public else Path(base).name,
            "objectives": [{"name": o.name, "reward": _reward(o.reward)} for o in loaded.objectives],
            "default_weights": loaded.default_weights,
            "default_rule": loaded.default_rule,
            "rules": [{"name": name, **_about(name)} for name in self.rules],
            "steps": loaded.num_inference_steps,
            "guidance": loaded.guidance,
            "guidance_scale": loaded.guidance_scale,
            "width": width,
            "height": height,
            "prompts": _example_prompts(loaded),
            "training": loaded.training.to_json(),
            "evaluation": _evaluation(loaded),
        }


def load_sets(
    sources: Sequence[str | Path],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    decode_batch_size: int | None = None,
) -> tuple[list[ServedSet], BatchedAdapters]:
    """Load sets of one base, and all their adapters on its network.

    Raises:
        ValueError: for a faulty set, two of one name, one of another base than the first, one whose default rule needs
            rewards, and adapters that cannot be batched.
    """
    named = [names_of(source) for source in sources]
    for name, _ in named:
        if [other for other, _ in named].count(name) > 1:
            raise ValueError(f"two sets are named {name!r}; rename the folder of one of them")
    served: list[ServedSet] = []
    for number, (source, (name, public)) in enumerate(zip(sources, named, strict=True), 1):
        loaded = load_set(source, read_weights=False)
        suffix = "" if number == 1 else f"__{number}"
        if get_default_rule(loaded.default_rule).needs:
            raise ValueError(
                f"the default rule of {name}, {loaded.default_rule}, needs rewards, which the server does not load; "
                "give the set another one"
            )
        try:
            sampler = FusedSampler.from_pretrained(
                renamed(loaded, suffix),
                pipeline=served[0].sampler.pipeline if served else None,
                forwards="separate",
                dtype=dtype,
                device=device,
                decode_batch_size=decode_batch_size,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        served.append(ServedSet(name=name, source=public, loaded=loaded, sampler=sampler, suffix=suffix))
    first = served[0].sampler
    names = [f"{adapter.name}{each.suffix}" for each in served for adapter in each.loaded.all_adapters]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two objectives are named {name!r} on the network; rename one of them in its set")
    return served, BatchedAdapters(first.denoiser.network, names, first.backbone.unbatched)


def renamed(loaded: AdapterSet, suffix: str) -> AdapterSet:
    """The set with a suffix to the name of each objective, and of each oracle."""

    def by_name(values: Mapping[str, float]) -> dict[str, float]:
        return {f"{name}{suffix}": value for name, value in values.items()}

    named = loaded.map_adapters(
        lambda adapter: replace(adapter, objective=replace(adapter.objective, name=f"{adapter.objective.name}{suffix}"))
    )
    return replace(
        named,
        default_weights=by_name(loaded.default_weights),
        oracles=tuple(
            replace(oracle, weights=by_name(oracle.weights), scales=by_name(oracle.scales)) for oracle in named.oracles
        ),
        profiles=tuple(replace(p, mixtures=tuple(map(by_name, p.mixtures))) for p in loaded.profiles),
    )


def names_of(source: str | Path) -> tuple[str, str]:
    """A set's name, and what others load it by."""
    text = str(source)
    if not Path(text).is_dir() and parse_id(text) is not None:
        return text.partition("@")[0], text
    path = Path(text)
    local = not path.is_absolute() and ".." not in path.parts  # as it is typed where the server was started
    if local and path.name:
        return set_name(path), text
    folder = path.resolve()
    name = set_name(folder)
    return name, name if name == folder.name else f"{name}/{folder.name}"


def _identity(loaded: AdapterSet) -> str:
    """A hash of all that a set's pictures depend on: another one of the same name has another."""
    values = {
        "base": loaded.base,
        "reference": schedule_to_dict(loaded.base_schedule),
        "adapters": [(objective_to_dict(adapter.objective), adapter.sha256) for adapter in loaded.all_adapters],
        "oracles": [oracle.weights for oracle in loaded.oracles],
        "profiles": [profile_to_dict(profile) for profile in loaded.profiles],
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _reward(name: str) -> str:
    """A reward's name; of a file or a folder only the last part of the path, and of a server no address."""
    if "://" in name:
        return "a reward server"
    return name if "/" not in name else name.rpartition("/")[2]


def _about(rule: str) -> dict[str, str]:
    """A rule in plain words, and its cost by its docstring; of a user's rule without a summary, its first sentence."""
    text = " ".join((RULES[rule].__doc__ or "").split())
    cost = text.partition("Cost: ")[2].partition(".")[0]
    return {"summary": RULES[rule].summary or text.partition(". ")[0].removesuffix(".") + ".", "cost": cost}


def _example_prompts(loaded: AdapterSet) -> list[str]:
    if loaded.base["name_or_path"] in emoji.BASES:
        return [*EXAMPLES, *load_prompts("emoji-heldout:5")]
    return load_prompts("colours-heldout:8")


def _evaluation(loaded: AdapterSet) -> dict[str, Any] | None:
    """What an evaluation of the set measured, its weights as mappings, with the units of its rewards."""
    if loaded.evaluation is None:
        return None
    cells = [
        cell | {"weights": parse_weights(cell["weights"]) if cell["weights"] else {}}
        for cell in loaded.evaluation["cells"]
        if not is_user_code(cell["rule"])
    ]
    units = {name: reward_unit(reward) for name, reward in loaded.evaluation["objectives"].items()}
    return dict(loaded.evaluation) | {"cells": cells, "units": units}


def guidance_of(each: ServedSet, source: str | None, scale: float | None) -> Guidance:
    """The guidance of a request, by default that of the set; a ValueError for what the base does not take."""
    loaded = each.loaded
    chosen = Guidance(source=source or loaded.guidance, scale=loaded.guidance_scale if scale is None else scale)
    each.sampler.backbone.check_guidance(chosen)
    return chosen
