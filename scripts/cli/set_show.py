"""`stepfuse set show`."""

import json

from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Arguments, Parser


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse set show emoji")
    declare.adapter_set(parser)


def run(arguments: Arguments) -> None:
    check_set(arguments.set)

    from stepfuse.fuse.rules.schedules import schedule_to_dict
    from stepfuse.fuse.rules.weights import label_weights
    from stepfuse.fuse.sampling.measure_gaps import describe_gaps
    from stepfuse.fuse.sets.adapter_set import load_set
    from stepfuse.rewards.shaping import Shaping

    loaded = load_set(arguments.set)
    revision = f" at {loaded.base['revision']}" if loaded.base.get("revision") else ""
    print(f"base        {loaded.base['name_or_path']}{revision}")
    print(f"guidance    {loaded.describe_guidance()}")
    print(f"steps       {loaded.num_inference_steps}")
    if resolution := loaded.base.get("resolution"):
        print(f"resolution  {resolution}")
    print(f"rule        {loaded.default_rule}")
    print(f"trained     {loaded.training}")
    print(f"reference   {json.dumps(schedule_to_dict(loaded.base_schedule))}")
    for adapter in loaded.adapters:
        objective, shaping, record = adapter.objective, adapter.objective.shaping, adapter.record
        print(f"\n{adapter.name}  (default weight {loaded.default_weights.get(adapter.name, 0):g})")
        print(f"  reward    {objective.reward}")
        print(f"  variance  {json.dumps(schedule_to_dict(objective.variance))}")
        print(f"  beta      {objective.beta:g}")
        print(f"  rank      {adapter.rank}")
        if shaping != Shaping():
            clip = f", clipped to {list(shaping.clip)}" if shaping.clip else ""
            print(f"  learnt    (reward - {shaping.shift:g}) / {shaping.scale:g}{clip}")
        if adapter.source:
            print(f"  from      {adapter.source}")
        if "algorithm" in record:
            kl = "" if record.get("kl") is None else f", KL {record['kl']:.3g} nats"
            print(f"  trained   {record['algorithm']}, {record.get('steps')} steps{kl}")
        for moment, measured in (record.get("validation") or {}).items():
            print(f"  reward {moment:7} {measured['reward']:.3f} over {measured['images']} images")
        print(f"  licence   {adapter.license or 'not stated'}")
    for profile in loaded.profiles:
        print(f"\n{describe_gaps(profile)}")
    for oracle in loaded.oracles:
        print(f"\noracle {oracle.adapter.name}  ({label_weights(oracle.weights)})")
