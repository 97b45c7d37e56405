"""One expert a step: chances, shares and the generators behind them."""

from dataclasses import replace

import pytest
import torch

from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.rules.one_expert import systematic_choices
from stepfuse.fuse.rules.plan import Expert, Plan
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.fuse.rules.run import private_generator, uniform_numbers
from stepfuse.fuse.rules.step import FusionStep
from tests.fixtures_tiny import ddim, generators


def test_switch_draws_each_expert_with_its_probability():
    """10,000 images, exponents 0.5, 0.3, 0 and 0.2 of the base: shares within 4.5 standard errors of 0.005."""
    images, exponents = 10_000, torch.tensor([0.5, 0.3, 0.0, 0.2], dtype=torch.float64)
    seen = []
    step = random_step(exponents, images)
    get_rule("switch").fuse(replace(step, predict_fn=spy(seen)))
    shares = torch.tensor([sum(n for name, n in seen if name == adapter) / images for adapter in ("a", "b", "c", None)])
    assert (shares - exponents).abs().max() < 4.5 * 0.005
    assert shares[2] == 0


@pytest.mark.parametrize(
    "weights",
    [
        (0.5, 0.5),
        (0.98, 0.02),
        (0.02, 0.98),
        (0.5, 0.3, 0.2),
        (0.96, 0.02, 0.02),
        (0.6, 0.0, 0.4),
        (0.1, 0.2, 0.3, 0.4),
        (0.5, 0.25, 0.15, 0.1),
        (0.4, 0.3, 0.2, 0.06, 0.04),
        (1.0, 0.0, 0.0),
    ],
)
def test_systematic_chooses_each_expert_with_its_probability_at_every_step(weights):
    """4,000 random phases: shares within 4.5 standard errors sqrt(w (1 - w) / 4000)."""
    a = torch.tensor([*weights, 0.0], dtype=torch.float64)
    uniforms = torch.rand(4000, len(a), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = (a * (1 - a) / 4000).sqrt()
    for number in (1, 2, 7):
        choice = systematic_choices(a[None, :, None].expand(number, -1, 4000), uniforms)[-1]
        shares = torch.bincount(choice, minlength=len(a)) / 4000
        assert ((shares - a).abs() <= 4.5 * error).all()


def test_systematic_keeps_its_probabilities_where_weights_change():
    """Half the images change after three steps, an expert coming in late; each step by its own weights."""
    late = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 3 + [[0.5, 0.2, 0.3, 0.0]] * 4, dtype=torch.float64)
    same = torch.tensor([[0.1, 0.2, 0.7, 0.0]] * 7, dtype=torch.float64)
    exponents = torch.stack([late, same], 2).repeat_interleave(4000, 2)
    uniforms = torch.rand(8000, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for number in range(1, 8):
        choice = systematic_choices(exponents[:number], uniforms)[-1]
        for a, rows in ((late[number - 1], slice(4000)), (same[number - 1], slice(4000, 8000))):
            shares = torch.bincount(choice[rows], minlength=4) / 4000
            assert ((shares - a).abs() <= 4.5 * (a * (1 - a) / 4000).sqrt()).all()


def test_experts_that_take_no_part_change_no_choice():
    a = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    uniforms = torch.rand(500, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    more = torch.zeros(8, dtype=torch.float64).index_copy(0, torch.tensor([0, 1, 5]), a)
    few, many = (systematic_choices(b[None, :, None].expand(4, -1, 500), uniforms) for b in (a, more))
    assert torch.equal(torch.tensor([0, 1, 5])[few], many)


def test_every_stretch_of_a_systematic_run_holds_its_due_share():
    """With weights 0.7 and 0.3 any window of k steps holds the first 0.7 k times, within 1; i.i.d. draws do not."""
    a = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)[None, :, None].expand(20, -1, 50)
    uniforms = torch.rand(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = (systematic_choices(a, uniforms) == 0).double()
    sums = torch.cat([torch.zeros(1, 50).double(), first.cumsum(0)])
    for begin in range(20):
        for end in range(begin + 1, 21):
            assert ((sums[end] - sums[begin]) - 0.7 * (end - begin)).abs().max() < 1 + 1e-9


def random_step(exponents, images):
    """A step whose experts differ by their networks alone."""
    path = NoisePath.from_scheduler(ddim())
    strength = 1 - exponents[-1].item()
    plan = Plan(
        path=path,
        steps=[(501, 251)],
        objectives=[Expert.adapter(name, EtaSchedule()) for name in "abc"],
        base=Expert.base(EtaSchedule()),
        weights=(exponents[:-1] / strength)[None, :, None].expand(1, 3, images),
        strength=strength,
    )
    uniforms = uniform_numbers(plan, generators(*range(images)))
    return FusionStep(
        plan=plan,
        step_index=0,
        x_t=torch.zeros(images, 1),
        predict_fn=spy([]),
        uniforms=uniforms,
        images=torch.arange(images),
    )


def spy(seen):
    def predict(x_t, t, networks, images, rows):
        rows = [images if some is None else some for some in rows]
        seen.extend((network.adapter, len(some)) for network, some in zip(networks, rows, strict=True))
        return [x_t[some] for some in rows]

    return predict


def test_random_choices_leave_the_generators_as_they_were():
    generator = torch.Generator().manual_seed(3)
    private_generator(generator), private_generator(generator, 1)
    assert torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=torch.Generator().manual_seed(3)))


def test_private_generators_of_one_image_differ():
    generator = torch.Generator().manual_seed(3)
    firsts = {torch.rand(1, generator=private_generator(generator, *place)).item() for place in [(), (1,), (2,), (3,)]}
    assert len(firsts) == 4
