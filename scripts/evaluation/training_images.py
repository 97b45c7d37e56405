"""How many images the adapters of a set drew in their training, from the records of the runs."""

from collections.abc import Mapping
from typing import Any

from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.sets.adapter_set import AdapterSet


def images_drawn(adapter_set: AdapterSet, rule: FusionRule) -> int | None:
    """The images that training drew for what a rule samples with: the adapters of a set, or for oracles its oracles.

    Adapters that were trained together, in one run, have one record of it, whose images are counted once. None where
    the run of an adapter is not known, as that of an imported one.
    """
    if rule.accepts == "none":
        return 0
    oracles = [oracle.adapter for oracle in adapter_set.oracles]
    adapters = oracles if rule.accepts == "trained" else adapter_set.adapters
    runs = {_run(adapter.record) or (adapter.name,): images_of_run(adapter.record) for adapter in adapters}
    counts = [count for count in runs.values() if count is not None]
    return sum(counts) if len(counts) == len(runs) else None


def _run(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What identifies the run of adapters that were trained together; empty for one that was trained alone."""
    together = isinstance(record.get("joint"), Mapping) or isinstance(record.get("distilled"), Mapping)
    return ("together", str(record.get("config_sha256"))) if together else ()


def images_of_run(record: Mapping[str, Any]) -> int | None:
    """train_batch_size × gradient_accumulation_steps × processes × rollouts, with DPO × num_candidates.

    None if these are not recorded.

    At each step of an image DPO denoises and scores `num_candidates` candidates, as it would of so many images. On
    pairs of a data set nothing is drawn. Records without the number of processes are taken for those of one. Images of
    validation do not count. None too for a run that started from other adapters.
    """
    config = record.get("config") or {}
    try:
        if config.get("init_set"):
            return None  # those of the adapters that it started from are not known
        if config.get("pairs"):
            return 0
        # `steps` of the record are those of the best checkpoint where that became the adapter.
        stopped = [entry["step"] for entry in record.get("health") or [] if "max_kl" in entry]
        steps = stopped[0] if stopped else config["max_train_steps"]
        rollouts = -(-steps // config.get("num_inner_epochs", 1))
        batch = config["train_batch_size"] * config["gradient_accumulation_steps"] * record.get("processes", 1)
        return int(batch * rollouts * config.get("num_candidates", 1))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return None  # an unknown form of record
