"""`stepfuse set show`."""

import argparse
import json
from typing import TYPE_CHECKING

from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Parser

if TYPE_CHECKING:
    from stepfuse.fuse.sets.entries import Adapter


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse set show emoji")
    declare.adapter_set(parser)


def run(arguments: argparse.Namespace) -> None:
    check_set(arguments.set)

    from stepfuse.fuse.rules.schedules import schedule_to_dict
    from stepfuse.fuse.rules.weights import label_weights
    from stepfuse.fuse.sampling.measure_gaps import describe_gaps
    from stepfuse.fuse.sets.adapter_set import load_set

    loaded = load_set(arguments.set)
    revision = f" at {loaded.base['revision']}" if loaded.base.get("revision") else ""
    print(f"base        {loaded.base['name_or_path']}{revision}")
    print(f"guidance    {loaded.guidance}, scale {loaded.guidance_scale:g}")
    print(f"steps       {loaded.num_inference_steps}")
    print(f"rule        {loaded.default_rule}")
    print(f"reference   {json.dumps(schedule_to_dict(loaded.base_schedule))}")
    for adapter in loaded.adapters:
        print(f"\n{adapter.name}  (default weight {loaded.default_weights.get(adapter.name, 0):g})")
        for title, value in adapter_lines(adapter).items():
            print(f"  {title:10}{value}")
    for profile in loaded.profiles:
        print(f"\n{describe_gaps(profile)}")
    for oracle in loaded.oracles:
        print(f"\noracle {oracle.adapter.name}  ({label_weights(oracle.weights)})")


def adapter_lines(adapter: "Adapter") -> dict[str, str]:
    """What is printed of an adapter, by the title of the line."""
    from stepfuse.fuse.rules.schedules import schedule_to_dict
    from stepfuse.rewards.shaping import Shaping

    objective, record = adapter.objective, adapter.record
    lines = {
        "reward": objective.reward,
        "variance": json.dumps(schedule_to_dict(objective.variance)),
        "beta": f"{objective.beta:g}",
        "rank": str(adapter.rank),
    }
    if objective.shaping != Shaping():
        shaping = objective.shaping
        clip = f", clipped to {list(shaping.clip)}" if shaping.clip else ""
        lines["learnt"] = f"(reward - {shaping.shift:g}) / {shaping.scale:g}{clip}"
    if adapter.source:
        lines["from"] = adapter.source
    if "algorithm" in record:
        kl = "" if record.get("kl") is None else f", KL {record['kl']:.3g} nats"
        lines["trained"] = f"{record['algorithm']}, {record.get('steps')} steps{kl}"
    for moment, measured in (record.get("validation") or {}).items():
        lines[f"reward {moment:7} "] = f"{measured['reward']:.3f} over {measured['images']} images"
    return lines | {"licence": adapter.license or "not stated"}
