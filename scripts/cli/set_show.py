"""`stepfuse set show`."""

import json
import textwrap
from typing import TYPE_CHECKING

from stepfuse.data.stages import import_libraries
from stepfuse.data.text_table import text_table
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Arguments, Parser

if TYPE_CHECKING:
    from stepfuse.fuse.sets.adapter_set import AdapterSet


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse set show emoji-flow")
    declare.adapter_set(parser)


def run(arguments: Arguments) -> None:
    check_set(arguments.set)

    import_libraries()

    from stepfuse.data.intervals import interval_text
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
            print(f"  learnt    {shaping}")
        if adapter.source:
            print(f"  from      {adapter.source}")
        if "algorithm" in record:
            kl = "" if record.get("kl") is None else f", KL {record['kl']:.3g} nats in its last batches"
            print(f"  trained   {record['algorithm']}, {record.get('steps')} steps{kl}")
        if adapter.gain:
            print(f"  gain      {interval_text(adapter.gain, signed=True)} over the base")
        for moment, measured in (record.get("validation") or {}).items():
            print(f"  reward {moment:7} {measured['reward']:.3f} over {measured['images']} images")
        print(f"  licence   {adapter.license or 'not stated'}")
    if loaded.evaluation is not None:
        print(f"\n{measured_table(loaded)}")
    for profile in loaded.profiles:
        print(f"\n{describe_gaps(profile)}")
    for oracle in loaded.oracles:
        print(f"\noracle {oracle.adapter.name}  ({label_weights(oracle.weights)})")


def measured_table(loaded: "AdapterSet") -> str:
    """The gains that were measured of the set's default rule at full strength, as a table of fixed width."""
    from stepfuse.data.intervals import interval_text
    from stepfuse.fuse.rules.weights import shown_weights

    evaluation = loaded.evaluation or {}
    names = list(evaluation["objectives"])
    rows = [["weights", *names]]
    for cell in evaluation["cells"]:
        if cell["rule"] == loaded.default_rule and cell["strength"] == 1:
            gains = (cell["gains"].get(name) for name in names)
            rows.append([shown_weights(cell["weights"]), *(interval_text(gain, signed=True) for gain in gains)])
    prompts, seeds = (f"{evaluation[of]} {of.removesuffix('s' * (evaluation[of] == 1))}" for of in ("prompts", "seeds"))
    title = f"measured   gain over the base, rule {loaded.default_rule}, {prompts} × {seeds} [95 % intervals]"
    return "\n".join([title, textwrap.indent(text_table(rows), "  ")])
