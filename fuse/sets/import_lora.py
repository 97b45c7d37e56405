"""LoRAs that other tools trained, as adapters of a set."""

import tempfile
from pathlib import Path

from stepfuse.fuse.backbones.fingerprint import describe_base, same_base
from stepfuse.fuse.backbones.guidance import check_source
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.fuse.lora.convert import read_foreign
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.fuse.sets.create import add_adapter, create_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.fuse.sets.hub import check_lora, fetch_lora, parse_id
from stepfuse.fuse.sets.manifest import MANIFEST, check_writable

UNKNOWN = "unknown"  # the reward of a LoRA that was not trained on one


def import_lora(
    source: str,
    folder: Path,
    *,
    objective: str,
    variance: VarianceSchedule,
    reward: str = UNKNOWN,
    base: str | None = None,
    guidance: str | None = None,
    guidance_scale: float | None = None,
    steps: int | None = None,
    license: str | None = None,
    network_only: bool = False,
    weight_name: str | None = None,
    variant: str | None = None,
    resolution: int | None = None,
) -> AdapterSet:
    """Add a LoRA of another tool to a set, which is made if it does not exist.

    Args:
        source: a safetensors file, a folder as peft saves one, or a hub id.
        folder: of the set.
        objective: its name there.
        variance: of its transitions: declared, for it cannot be measured.
        reward: what it is meant to raise.
        base: of a set that is to be made.
        guidance: `full` by default, for published LoRAs expect an unconditional prediction of their own; in a set it is
            the set's.
        guidance_scale, steps: by default the set's, or 7.5 and 50.
        license: of its weights.
        network_only: leave out what is of text encoders.
        weight_name: which file of a repository.
        variant: of the weight files of the base of a set that is to be made, `fp16` for instance.
        resolution: height and width in pixels that it was trained at, of a set that is to be made; by default the
            base's own.

    Raises:
        ValueError: for a file that is no LoRA of the base, a set it cannot be part of, and a name that is taken.
    """
    check_lora(source)
    loaded = load_set(folder, read_weights=False) if (folder / MANIFEST).is_file() else None
    guidance, revision = check_source(guidance or "full"), None
    if loaded is not None:
        check_writable(folder)
        guidance_scale = loaded.guidance_scale if guidance_scale is None else guidance_scale
        _check_settings(folder, loaded, base, variant, resolution, guidance, guidance_scale)
        base, revision, variant = (loaded.base.get(key) for key in ("name_or_path", "revision", "variant"))
        resolution = loaded.base.get("resolution")
        steps = steps or loaded.num_inference_steps
    if base is None:
        raise ValueError(f"no set in {folder}; to make one, say of which base: --base OWNER/NAME")
    path = Path(source)
    if not path.exists():
        path = fetch_lora(source, weight_name)
    elif weight_name is not None:
        path /= weight_name
    backbone = backbone_of(load_pipeline(base, revision=revision, variant=variant, resolution=resolution, safe=True))
    described = describe_base(backbone, base, revision, variant=variant)
    if loaded is not None and not same_base(loaded.base, described):
        raise ValueError(f"{base!r} is no longer the base that set {folder} was made of")
    network = backbone.network
    factors = read_foreign(path, network, backbone.names(network.config), network_only=network_only)
    with tempfile.TemporaryDirectory() as temporary:
        adapter = Adapter(
            folder=Path(temporary, objective),
            objective=Objective(name=objective, reward=reward, variance=variance, beta=0.0),
            base=described,
            guidance=guidance,
            guidance_scale=7.5 if guidance_scale is None else guidance_scale,
            num_inference_steps=steps or 50,
            license=license,
            source=source if parse_id(source) else Path(source).name,
        )
        write_adapter(adapter, factors, backbone.part)
        return create_set(folder, [adapter.folder]) if loaded is None else add_adapter(folder, adapter.folder)


def _check_settings(
    folder: Path,
    loaded: AdapterSet,
    base: str | None,
    variant: str | None,
    resolution: int | None,
    guidance: str,
    guidance_scale: float,
) -> None:
    """Raise ValueError for arguments that contradict the set that the LoRA is added to."""
    if base is not None and base != loaded.base["name_or_path"]:
        raise ValueError(f"set {folder} is of base {loaded.base['name_or_path']!r}; leave out --base")
    if variant is not None and variant != loaded.base.get("variant"):
        raise ValueError(
            f"set {folder} is of the base's variant {loaded.base.get('variant') or 'none'}; leave out --variant"
        )
    if resolution is not None and resolution != loaded.base.get("resolution"):
        own = loaded.base.get("resolution") or "the base's own"
        raise ValueError(f"set {folder} has resolution {own}; leave out --resolution")
    if (guidance, guidance_scale) != (loaded.guidance, loaded.guidance_scale):
        raise ValueError(
            f"set {folder} has guidance {loaded.guidance} {loaded.guidance_scale:g} and a LoRA of another tool "
            f"{guidance} {guidance_scale:g}; a set has one: pass --guidance {loaded.guidance} --guidance_scale "
            f"{loaded.guidance_scale:g} to have it guided so"
        )
