"""What a set's card says of the denoising steps that its adapters spend their KL divergence in."""

from collections.abc import Sequence
from pathlib import Path

from stepfuse.data.kl_steps import KL_PICTURE, StepKL, draw_kl_steps, largest_step
from stepfuse.data.output_file import atomic_file
from stepfuse.fuse.sets.adapter_set import AdapterSet


def kl_steps_of(loaded: AdapterSet) -> dict[str, Sequence[StepKL]]:
    """The KL by denoising step of the adapters that recorded it, by name."""
    recorded = {adapter.name: adapter.record.get("kl_steps") or [] for adapter in loaded.all_adapters}
    return {name: steps for name, steps in recorded.items() if largest_step([step["nats"] for step in steps])}


def write_kl_picture(folder: Path, loaded: AdapterSet) -> None:
    """Write the picture of the KL by step, if an adapter recorded it."""
    if policies := kl_steps_of(loaded):
        with atomic_file(folder / KL_PICTURE) as temporary:
            draw_kl_steps(policies).save(temporary, format="PNG")


def kl_text(loaded: AdapterSet, shown: Sequence[str]) -> list[str]:
    """A sentence for each adapter that names the step with the largest KL, and the picture if it is shown."""
    lines = []
    for name, steps in kl_steps_of(loaded).items():
        if largest := largest_step([step["nats"] for step in steps]):
            index, share = largest
            place = f"denoising step {index + 1} of {len(steps)}"
            levels = f"σ {steps[index]['sigma_t']:.3g} to {steps[index]['sigma_s']:.3g}"
            lines.append(f"- `{name}` spends {100 * share:.0f} % of its KL in {place} ({levels}).")
    picture = [f"![KL divergence to the base by denoising step, of every adapter]({KL_PICTURE})"]
    return ["\n".join(lines), *picture * (KL_PICTURE in shown)] if lines else []
