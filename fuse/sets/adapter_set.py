"""An adapter set: one base, N adapters, and what is needed to fuse them, as a folder.

SET/
  adapter_set.json                        all that is known of it; docs/adapter-set.md
  NAME/pytorch_lora_weights.safetensors   one LoRA an objective, as `pipe.load_lora_weights` reads it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stepfuse.data.json_file import write_json
from stepfuse.data.output_folder import complete_interrupted
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.fuse.rules.gap_profile import GapProfile, profile_from_dict, profile_to_dict
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.schedules import schedule_from_dict, schedule_to_dict
from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.sets.adapter import check_adapter
from stepfuse.fuse.sets.entries import (
    Adapter,
    adapter_from_entry,
    adapter_to_entry,
    sampling_from_dict,
    sampling_to_dict,
)
from stepfuse.fuse.sets.hub import fetch_set, parse_id
from stepfuse.fuse.sets.manifest import (
    EMBEDDED_SETS,
    FORMAT_VERSION,
    MANIFEST,
    adapter_entries,
    check_files,
    check_path_in_set,
    check_schema,
    read_versioned,
)
from stepfuse.fuse.sets.set_training import APART, SetTraining, training_of
from stepfuse.fuse.sets.wrong_source import check_is_set
from stepfuse.rewards.reward_name import parse_reward


@dataclass(frozen=True, kw_only=True)
class OracleAdapter:
    """An adapter trained on a weighted sum of the set's rewards.

    Attributes:
        adapter: read and checked like the others.
        weights: of that sum, by objective name.
        scales: σ_i in that sum, by objective name.
    """

    adapter: Adapter
    weights: dict[str, float]
    scales: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class AdapterSet:
    """Adapters of one base that may be fused.

    Attributes:
        base: `name_or_path` and fingerprint.
        adapters: in the order of the manifest.
        base_schedule: variance schedule of the base policy, which counts where the strength is not 1.
        guidance: `shared`, `full`, `off` or `embedded`, of the images that are drawn.
        guidance_scale: g.
        num_inference_steps: default number of denoising steps.
        default_weights: by objective name.
        default_rule: how it is meant to be fused.
        oracles: adapters trained on mixtures of the rewards, to compare fusion with.
        profiles: how far a soup is from the product at each step, as `stepfuse set profile` measured it.
        evaluation: gains over the base that an evaluation measured.
        versions: of the packages it was made with.
    """

    base: dict[str, Any]
    adapters: tuple[Adapter, ...]
    base_schedule: VarianceSchedule
    guidance: str
    guidance_scale: float
    num_inference_steps: int
    default_weights: dict[str, float]
    default_rule: str = "product"
    oracles: tuple[OracleAdapter, ...] = ()
    profiles: tuple[GapProfile, ...] = ()
    evaluation: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def reward_scales(self) -> dict[str, float]:
        """σ_i, the unit the oracles were trained with; without any, the deviation measured on the base's images."""
        measured = {a.name: a.record.get("validation", {}).get("before", {}).get("deviation") for a in self.adapters}
        known = {name: value for name, value in measured.items() if value}
        for oracle in self.oracles:
            known |= oracle.scales
        return known

    @property
    def training(self) -> SetTraining:
        """How its adapters were trained, by their records."""
        return training_of(self.adapters)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return tuple(adapter.objective for adapter in self.adapters)

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.adapters]

    def describe_guidance(self) -> str:
        """Guidance of the set, and that of training where it differs."""
        first = self.adapters[0]
        own = Guidance(source=self.guidance, scale=self.guidance_scale)
        trained = Guidance(source=first.guidance, scale=first.guidance_scale)
        return str(own) if str(own) == str(trained) else f"{own}; adapters trained with {trained}"

    def map_adapters(self, change: Callable[[Adapter], Adapter]) -> "AdapterSet":
        """The set with each of its adapters changed, the oracles' too."""
        oracles = tuple(replace(oracle, adapter=change(oracle.adapter)) for oracle in self.oracles)
        return replace(self, adapters=tuple(map(change, self.adapters)), oracles=oracles)

    @property
    def all_adapters(self) -> tuple[Adapter, ...]:
        """The adapters, and then the oracles."""
        return (*self.adapters, *(oracle.adapter for oracle in self.oracles))


def save_manifest(folder: Path, loaded: AdapterSet) -> None:
    """Write the manifest of a set whose weights are in the folder; ValueError for values that its schema refuses."""
    values = {
        "format_version": FORMAT_VERSION,
        "base": loaded.base,
        "reference": schedule_to_dict(loaded.base_schedule),
        **sampling_to_dict(loaded),
        "default_weights": loaded.default_weights,
        "default_rule": loaded.default_rule,
        **({} if loaded.training == APART else {"training": loaded.training.to_json()}),
        "adapters": [adapter_to_entry(adapter) for adapter in loaded.adapters],
        "oracles": [
            {"weights": oracle.weights, "adapter": adapter_to_entry(oracle.adapter)} for oracle in loaded.oracles
        ],
        "profiles": [profile_to_dict(profile) for profile in loaded.profiles],
        "evaluation": loaded.evaluation,
        "versions": loaded.versions,
    }
    check_schema(folder / MANIFEST, values)
    write_json(folder / MANIFEST, values)


def load_set(folder: str | Path, *, read_weights: bool = True) -> AdapterSet:
    """Read and check a set: every file whole, every hash right, one base.

    Args:
        folder: where it is; `emoji-flow` or `emoji`, the sets of the bundled base models; or a hub id, `owner/name`
            or `owner/name@revision`.
        read_weights: False where the weights are put on a base next, which compares them with their hashes: then only
            the headers of their files are read and checked here.

    Raises:
        ValueError: naming the file at fault.
    """
    folder = set_folder(folder)
    loaded = read_manifest(folder)
    check_files(folder)
    for adapter in loaded.all_adapters:
        check_adapter(adapter, read_weights=read_weights)
    return loaded


def read_manifest(folder: Path) -> AdapterSet:
    """Read the manifest of a set alone; ValueError, naming the value at fault, for a malformed one."""
    check_is_set(folder)
    file = check_path_in_set(folder, MANIFEST)
    values = read_versioned(file, "an adapter set, as `stepfuse set create` writes it")
    check_schema(file, values)
    entries = adapter_entries(values)
    try:
        base = values["base"]
        adapters = tuple(adapter_from_entry(folder, entry, base) for entry in values["adapters"])
        loaded = AdapterSet(
            base=base,
            adapters=adapters,
            base_schedule=schedule_from_dict(values["reference"]),
            **sampling_from_dict(values),
            default_weights=values["default_weights"],
            default_rule=values.get("default_rule", "product"),
            oracles=tuple(
                make_oracle(adapter_from_entry(folder, given["adapter"], base), adapters, given["weights"])
                for given in values.get("oracles", [])
            ),
            profiles=tuple(profile_from_dict(profile) for profile in values.get("profiles", [])),
            evaluation=values.get("evaluation"),
            versions=values.get("versions", {}),
        )
        for key in ("name", "folder"):
            if len({entry[key] for entry in entries}) < len(entries):
                raise ValueError(f"two adapters have one {key}")
        measured = [mixture for profile in loaded.profiles for mixture in profile.mixtures]
        weight_table([loaded.default_weights, *(oracle.weights for oracle in loaded.oracles), *measured], loaded.names)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = str(error)
        raise ValueError(reason if reason.startswith(str(folder)) else f"{file} is malformed: {reason}") from error
    return loaded


def set_folder(folder: str | Path) -> Path:
    """The folder of a set: a folder itself, one of `EMBEDDED_SETS` by its name, or one of the hub by its id."""
    if str(folder) in EMBEDDED_SETS and not (Path(folder) / MANIFEST).exists():
        return EMBEDDED_SETS[str(folder)]
    if not Path(folder).exists() and parse_id(str(folder)) is not None:
        return fetch_set(str(folder))
    complete_interrupted(Path(folder))  # where a process was killed while it replaced the set
    return Path(folder)


def make_oracle(oracle: Adapter, adapters: Sequence[Adapter], weights: dict[str, float] | None = None) -> OracleAdapter:
    """An oracle with its scales, and by default its weights, of the reward it was trained on.

    Args:
        adapters: whose rewards are the terms of that reward.

    Raises:
        ValueError: for another kind of reward, and a term that no adapter was trained on.
    """
    reward = parse_reward(oracle.objective.reward)
    if reward.kind != "sum":
        raise ValueError(
            f"oracle {oracle.name!r} was trained on {oracle.objective.reward!r}; expected a weighted:… reward"
        )
    names = {adapter.objective.reward: adapter.name for adapter in adapters}
    for term in reward.terms:
        if term.name not in names:
            raise ValueError(
                f"oracle {oracle.name!r} was trained on {term.name!r} too, and no adapter of the set was; "
                f"the set's rewards are {', '.join(map(repr, names))}"
            )
    return OracleAdapter(
        adapter=oracle,
        weights={names[term.name]: term.weight for term in reward.terms} if weights is None else weights,
        scales={names[term.name]: term.scale for term in reward.terms},
    )
