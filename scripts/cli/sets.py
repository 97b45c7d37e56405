"""What the commands do that make, show, change and exchange sets; heavy imports wait until one is run."""

import argparse
import json
from pathlib import Path
from typing import Any

from stepfuse.data.output_folder import written_file
from stepfuse.data.text_files import read_text
from stepfuse.scripts.cli.checks import (
    check_adapter_folders,
    check_device_name,
    check_export,
    check_file,
    check_folder,
    check_lora,
    check_objective,
    check_objective_name,
    check_prompts,
    check_set,
    check_set_folder,
    check_texts,
    check_weights,
)


def create(arguments: argparse.Namespace) -> None:
    check_folder(arguments.output, overwrite=arguments.overwrite)
    check_adapter_folders([*arguments.adapter, *arguments.oracle])

    from stepfuse.fuse.diffusion.variance import EtaSchedule
    from stepfuse.fuse.sets.create import create_set

    created = create_set(
        arguments.output,
        arguments.adapter,
        oracles=arguments.oracle,
        reference=EtaSchedule(eta=arguments.reference_eta),
        half=arguments.half,
        base=arguments.base,
        base_license=arguments.base_license,
        license=arguments.license,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.output}: {', '.join(adapter.name for adapter in created.everyone)}")


def validate(arguments: argparse.Namespace) -> None:
    check_set(arguments.set)

    from stepfuse.fuse.sets.adapter_set import load_set

    loaded = load_set(arguments.set)
    if arguments.load:
        from stepfuse.fuse.backbones.loading import quiet_libraries
        from stepfuse.fuse.sampling.sampler import FusedSampler

        quiet_libraries()
        FusedSampler.from_pretrained(loaded)
    print(f"{arguments.set}: valid; {len(loaded.adapters)} adapters of base {loaded.base['name_or_path']!r}")


def show(arguments: argparse.Namespace) -> None:
    check_set(arguments.set)

    from stepfuse.fuse.rules.schedules import schedule_to_dict
    from stepfuse.fuse.rules.weights import label_weights
    from stepfuse.fuse.sampling.measure_gaps import describe_gaps
    from stepfuse.fuse.sets.adapter_set import load_set
    from stepfuse.rewards.shaping import Shaping

    loaded = load_set(arguments.set)
    revision = f" at {loaded.base['revision']}" if loaded.base.get("revision") else ""
    print(f"base        {loaded.base['name_or_path']}{revision}")
    print(f"guidance    {loaded.guidance}, scale {loaded.guidance_scale:g}")
    print(f"steps       {loaded.num_inference_steps}")
    print(f"rule        {loaded.default_rule}")
    print(f"reference   {json.dumps(schedule_to_dict(loaded.reference))}")
    for adapter in loaded.adapters:
        objective, record = adapter.objective, adapter.record
        print(f"\n{objective.name}  (default weight {loaded.default_weights.get(objective.name, 0):g})")
        print(f"  reward    {objective.reward}")
        print(f"  variance  {json.dumps(schedule_to_dict(objective.variance))}")
        print(f"  beta      {objective.beta:g}")
        print(f"  rank      {adapter.rank}")
        if objective.shaping != Shaping():
            shaping = objective.shaping
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


def profile(arguments: argparse.Namespace) -> None:
    check_prompts(arguments.prompts)
    check_device_name(arguments.device)
    check_set_folder(arguments.set)

    from stepfuse.fuse.sampling.measure_gaps import describe_gaps, measure_gaps
    from stepfuse.fuse.sets.adapter_set import load_set
    from stepfuse.fuse.sets.create import add_profile, check_writable

    loaded = load_set(arguments.set)
    check_writable(arguments.set)  # before minutes go into measuring
    prompts = _prompts(arguments.prompts, loaded, 16)
    sampler = _sampler(arguments, loaded, guidance=arguments.guidance, guidance_scale=arguments.guidance_scale)
    measured = measure_gaps(
        sampler, prompts, num_inference_steps=arguments.steps, seed=arguments.seed, batch_size=arguments.batch_size
    )
    add_profile(arguments.set, measured)
    print(describe_gaps(measured))


def write_card(arguments: argparse.Namespace) -> None:
    check_texts(arguments.prompt or [])
    check_device_name(arguments.device)
    check_set_folder(arguments.set)

    from stepfuse.fuse.sampling.strip import ROWS, draw_strip
    from stepfuse.fuse.sets.adapter_set import load_set
    from stepfuse.fuse.sets.card import STRIP, check_card, write_card
    from stepfuse.fuse.sets.create import add_evaluation, check_writable, set_licences

    folder = check_writable(arguments.set).parent
    loaded = load_set(folder)
    check_card(folder)  # before minutes go into the picture
    evaluation = arguments.evaluation
    if evaluation is not None and not (evaluation / "summary.json").is_file():
        raise ValueError(f"no summary.json in {evaluation}; expected the output of stepfuse evaluate")
    if not arguments.no_strip:
        prompts = arguments.prompt or _prompts(None, loaded, ROWS)
        strip = draw_strip(_sampler(arguments, loaded), prompts, seed=arguments.seed, progress=True)
        with written_file(folder / STRIP) as temporary:
            strip.save(temporary)
    if arguments.license or arguments.base_license:
        loaded = set_licences(folder, license=arguments.license, base_license=arguments.base_license)
    if evaluation is not None:
        loaded = add_evaluation(folder, json.loads(read_text(evaluation / "summary.json")))
    print(write_card(folder, loaded, evaluation))


def import_lora(arguments: argparse.Namespace) -> None:
    check_lora(arguments.lora)
    check_objective_name(arguments.objective)

    from stepfuse.fuse.backbones.loading import quiet_libraries
    from stepfuse.fuse.sets.exchange import import_lora

    quiet_libraries()
    loaded = import_lora(
        arguments.lora,
        arguments.set,
        objective=arguments.objective,
        eta=arguments.eta,
        reward=arguments.reward,
        base=arguments.base,
        guidance=arguments.guidance,
        guidance_scale=arguments.guidance_scale,
        steps=arguments.steps,
        license=arguments.license,
        unet_only=arguments.unet_only,
        weight_name=arguments.weight_name,
        variant=arguments.variant,
    )
    print(f"{arguments.set}: {', '.join(loaded.names)}")


def export(arguments: argparse.Namespace) -> None:
    known = check_set(arguments.set, oracles=True)
    check_objective(arguments.objective, known, arguments.set)
    if arguments.output is not None:
        check_export(arguments.output, arguments.objective, arguments.format, overwrite=arguments.overwrite)

    from stepfuse.fuse.sets.exchange import export

    print(
        export(
            arguments.set,
            arguments.objective,
            form=arguments.format,
            output=arguments.output,
            overwrite=arguments.overwrite,
        )
    )


def merge(arguments: argparse.Namespace) -> None:
    if arguments.output.suffix != ".safetensors":
        raise ValueError(f"--output {arguments.output}; expected a name that ends in .safetensors")
    check_file(arguments.output, overwrite=arguments.overwrite)
    texts = [] if arguments.weights is None else [arguments.weights]
    weights = check_weights(texts, check_set(arguments.set))

    from stepfuse.fuse.sets.exchange import merge

    rank, error = merge(
        arguments.set,
        weights[0] if weights else None,
        arguments.output,
        strength=arguments.strength,
        rank=arguments.rank,
        form=arguments.format,
        overwrite=arguments.overwrite,
    )
    told = f"rank {rank}" + (f", {100 * error:.2g} % of the exact soup left out" if error else ", the exact soup")
    print(f"{arguments.output}: {told}")


def publish(arguments: argparse.Namespace) -> None:
    check_set(arguments.set)

    from stepfuse.fuse.sets.publish import check_token, confirmed, prepare, publish

    if not arguments.dry_run:
        check_token()
    publication = prepare(
        arguments.set,
        arguments.repository,
        revision=arguments.revision,
        private=arguments.private,
        ask_hub=not arguments.dry_run,
    )
    print(publication)
    if arguments.dry_run:
        print("nothing was sent")
    elif arguments.yes or confirmed(publication):
        print(publish(publication))
    else:
        print("nothing was sent")


def pull(arguments: argparse.Namespace) -> None:
    output = arguments.output or Path(str(arguments.set).rpartition("/")[2].partition("@")[0])
    check_set(arguments.set)
    check_folder(output, overwrite=arguments.overwrite)

    from stepfuse.fuse.sets.create import copy_set

    loaded = copy_set(arguments.set, output, overwrite=arguments.overwrite)
    print(f"{output}: {', '.join(loaded.names)}")


def _prompts(given: str | None, loaded: Any, count: int) -> list[str]:
    """Prompts as given, or some that suit the base."""
    from stepfuse.data.prompts import load_prompts
    from stepfuse.fuse.backbones.loading import EMBEDDED

    kind = "emoji-heldout" if loaded.base["name_or_path"] in EMBEDDED else "colours-heldout"
    return load_prompts(given or f"{kind}:{count}")


def _sampler(arguments: argparse.Namespace, loaded: Any, **options: Any) -> Any:
    import torch

    from stepfuse.fuse.backbones.loading import quiet_libraries
    from stepfuse.fuse.sampling.sampler import FusedSampler
    from stepfuse.scripts.cli.commands import check_device

    device = check_device(arguments.device)
    quiet_libraries()
    return FusedSampler.from_pretrained(loaded, dtype=getattr(torch, arguments.dtype), device=device, **options)
