"""The sets of an evaluation: the one that is evaluated, and others of its base that rules name."""

from collections.abc import Iterable, Mapping
from typing import Any

from stepfuse.fuse.backbones.fingerprint import same_base
from stepfuse.fuse.backbones.loading import INPUTS
from stepfuse.fuse.rules.gap_profile import profile_to_dict
from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set

EVALUATED = ""  # the name of the set that is evaluated


class Samplers:
    """A sampler for each set. All of them use one pipeline, which has the adapters of one set at a time.

    The memory is that of one set, and changing to another set costs reading its LoRAs.

    Args:
        sets: by name; the first one loads the base.
        options: for `FusedSampler.from_pretrained`, the same for all sets.

    Raises:
        ValueError: for a faulty set.
    """

    def __init__(self, sets: Mapping[str, AdapterSet], **options: Any) -> None:
        self._sets, self._options = sets, options
        self._name = next(iter(sets))
        self.loaded = FusedSampler.from_pretrained(sets[self._name], **options)

    def of(self, name: str) -> FusedSampler:
        """The sampler of a set; samplers of other sets cannot be used any more."""
        if name != self._name:
            self.loaded.backbone.network.unload_lora()
            pipeline, self._name = self.loaded.pipeline, name
            self.loaded = FusedSampler.from_pretrained(self._sets[name], pipeline=pipeline, **self._options)
        return self.loaded


def load_sets(evaluated: AdapterSet, names: Iterable[str]) -> dict[str, AdapterSet]:
    """The set that is evaluated and those of these names; ValueError for one that cannot be compared with it."""
    sets = {EVALUATED: evaluated}
    for name in names:
        if name not in sets:
            sets[name] = load_set(name, read_weights=False)
            _check_comparable(name, sets[name], evaluated)
    return sets


def _check_comparable(name: str, other: AdapterSet, evaluated: AdapterSet) -> None:
    """Check that another set has the same objectives, and the images of its base are the same."""
    if sorted(other.names) != sorted(evaluated.names):
        raise ValueError(
            f"the set {name!r} has the objectives {', '.join(other.names)}, and the set that is evaluated "
            f"{', '.join(evaluated.names)}; expected the same names"
        )
    if not same_base(other.base, evaluated.base):
        raise ValueError(
            f"the set {name!r} is of another base, {other.base['name_or_path']!r}, than the set that is evaluated, "
            f"{evaluated.base['name_or_path']!r}; expected a set of the same base"
        )
    for key in INPUTS:
        if other.base.get(key) != evaluated.base.get(key):
            raise ValueError(
                f"the set {name!r} records {key} {other.base.get(key)}, and the set that is evaluated "
                f"{evaluated.base.get(key)}; expected the same, as their base's images are"
            )
    references = [schedule_to_dict(each.base_schedule) for each in (other, evaluated)]
    if references[0] != references[1]:
        raise ValueError(
            f"the set {name!r} has the base policy {references[0]}, and the set that is evaluated {references[1]}; "
            "create one of them again with the base_schedule of the other"
        )


def set_identity(adapter_set: AdapterSet, *, uses_gaps: bool) -> dict[str, Any]:
    """What the images of a set depend on, besides its base and how it is sampled."""
    objectives = [adapter.objective for adapter in adapter_set.all_adapters]
    profiles = [profile_to_dict(profile) for profile in adapter_set.profiles]
    return {
        "adapters": {adapter.name: adapter.sha256 for adapter in adapter_set.all_adapters},
        "objectives": [[o.name, o.reward, o.beta, schedule_to_dict(o.variance)] for o in objectives],
    } | ({"profiles": profiles} if uses_gaps else {})
