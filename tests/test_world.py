"""The oracle world: its closed forms against other libraries and quadrature, and what it says of the rules."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from stepfuse.fuse.diffusion.schedulers import STABLE_DIFFUSION
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.fuse.rules.run import uniform_numbers
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.oracle_world.measure import WEIGHTS, expected_kl, measure_world, sliced_distance
from stepfuse.scripts.oracle_world.world import DATA, AverageStep, World, world_of

KINDS = ("equal", "distinct")
CASES = [(kind, weights) for kind in KINDS for number in WEIGHTS for weights in WEIGHTS[number]]


def points(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scheduler_of(steps: int) -> DDIMScheduler:
    """Diffusers' own, its tables in float64."""
    scheduler = DDIMScheduler(**STABLE_DIFFUSION)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    return scheduler


def mixture(scale: float, noise: float) -> torch.distributions.MixtureSameFamily:
    """scale x_0 + N(0, noise I) in torch's own distributions."""
    variances = scale**2 * torch.tensor(DATA.variances) + noise
    components = torch.distributions.Normal(scale * torch.tensor(DATA.means), variances.sqrt()[:, None])
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor(DATA.weights)), torch.distributions.Independent(components, 1)
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("world")
    return measure_world(folder, samples=300, replicates=6, objectives=(2,), steps=(10,)), folder


def cell_of(result: dict, kind: str, weights: tuple[float, ...] = (0.5, 0.5)) -> dict:
    (cell,) = (c for c in result["cells"] if c["variances"] == kind and c["weights"] == weights)
    return cell


# The closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 101, 501, 981])
def test_the_denoiser_obeys_tweedies_formula(t: int) -> None:
    """E[x_0 | x_t] = (x_t + sigma² ∇ log p_t(x_t)) / alpha, the gradient by autograd."""
    world = world_of("equal", (0.5, 0.5), 10)
    square = scheduler_of(10).alphas_cumprod[t].item()
    x_t = (2 * points(50)).requires_grad_()
    (score,) = torch.autograd.grad(mixture(square**0.5, 1 - square).log_prob(x_t).sum(), x_t)
    expected = (x_t + (1 - square) * score) / square**0.5
    np.testing.assert_allclose(world.clean(x_t.detach().numpy(), t), expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_the_tilted_data_have_the_moments_of_quadrature(kind: str, weights: tuple[float, ...]) -> None:
    world = world_of(kind, weights, 10)
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    rewards = zip(weights, world.objectives, strict=True)
    weighted = sum(w * objective.reward(grid, torch.arange(len(grid))) for w, objective in rewards)
    log_density = mixture(1.0, 0.0).log_prob(grid) + weighted
    density = log_density.softmax(0)
    tilted = world.tilted_data()
    np.testing.assert_allclose(tilted.weights @ tilted.means, density @ grid, atol=1e-8)
    second = (tilted.weights * (tilted.means**2).sum(1)).sum() + 2 * (tilted.weights * tilted.variances).sum()
    assert second == pytest.approx((density @ (grid**2).sum(1)).item(), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [10, 50])
def test_each_expert_is_the_reference_tilted_by_its_reward(kind: str, steps: int) -> None:
    """p_i ∝ p_ref,i exp(Q_i / beta_i) by quadrature a dimension; p_ref,i is diffusers' step, Q_i the docstring's."""
    world, scheduler = world_of(kind, (0.25,) * 4, steps), scheduler_of(steps)
    x_t = points(3)
    run = world.run(get_rule("base"), len(x_t))
    variances = [scheduler._get_variance(t, t - 1000 // steps).item() for t, _ in world.times]
    alphas = [(scheduler.alphas_cumprod[s] if s >= 0 else scheduler.final_alpha_cumprod).sqrt() for _, s in world.times]
    scale = sum(alpha * v for alpha, v in zip(alphas, variances, strict=True))
    for number, (t, _) in enumerate(world.times):
        step = run.step(number, x_t, torch.zeros(3, steps))
        noise = torch.from_numpy(world.noise(x_t.numpy(), t))
        for objective, expert in zip(world.objectives, run.plan.objectives, strict=True):
            gaussian = step.gaussian(expert)
            zeros = torch.zeros_like(noise)
            mean = scheduler.step(noise, t, x_t, eta=objective.eta, variance_noise=zeros).prev_sample
            sd, alpha = objective.eta * variances[number] ** 0.5, alphas[number]
            x = mean + sd * torch.linspace(-12, 12, 2001, dtype=torch.float64)[:, None, None]
            centre, slope = alpha * torch.tensor(objective.centre), torch.tensor(objective.slope)
            q = alpha / scale * (slope * x - objective.curvature * (x - centre) ** 2 / 2)
            density = (-((x - mean) ** 2) / (2 * sd**2) + q / objective.beta).softmax(0)
            expected = (density * x).sum(0)
            spread = (density * (x - expected) ** 2).sum(0)
            torch.testing.assert_close(gaussian.mean, expected, rtol=1e-7, atol=1e-8)
            torch.testing.assert_close(gaussian.variance.expand_as(spread), spread, rtol=1e-6, atol=0)


# The rules against the target -----------------------------------------------------------------


@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_the_product_is_the_target_at_every_step(kind: str, weights: tuple[float, ...]) -> None:
    world = world_of(kind, weights, 20)
    rule, x_t = get_rule("product"), 1.5 * points(64)
    run = world.run(rule, 64)
    for number, (t, s) in enumerate(world.times):
        fused, target = rule.fuse(run.step(number, x_t, torch.zeros(64, 20))), world.target(x_t.numpy(), t, s)
        torch.testing.assert_close(fused.mean, target.mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(fused.variance.expand(64, 1), target.variance.expand(64, 1), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_averaged_noises_are_the_target_for_equal_variances_alone(kind: str, weights: tuple[float, ...]) -> None:
    kl = expected_kl(world_of(kind, weights, 10), 64, 0)
    assert kl["product"] < 1e-9
    assert kl["base"] > 1e-3
    assert (kl["average_noise"] < 1e-9) == (kind == "equal")


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_step_is_the_target_for_equal_variances_alone(kind: str) -> None:
    world, x_t = world_of(kind, (0.8, 0.2), 10), points(8)
    rule, differences = AverageStep(), []
    run = world.run(rule, 8)
    for number, (t, s) in enumerate(world.times):
        step, target = run.step(number, x_t, torch.zeros(8, 10)), world.target(x_t.numpy(), t, s)
        differences.append((rule.fuse(step).mean - target.mean).abs().max().item())
    assert (max(differences) < 1e-9) == (kind == "equal")


@pytest.mark.parametrize("name", ["product", "switch", "systematic", "rgg"])
def test_a_run_of_one_image_is_the_samplers_own(name: str) -> None:
    """`run_rule` draws a batch from one generator; for one image that is `FusionRule.denoise`."""
    world = world_of("distinct", (0.5, 0.3, 0.2), 10)
    rule, x = get_rule(name), points(1)
    run = world.run(rule, 1)
    uniforms = uniform_numbers(run.plan, [torch.Generator().manual_seed(3)])
    expected = rule.denoise(run, x, [torch.Generator().manual_seed(3)])
    torch.testing.assert_close(world.run_rule(rule, x, uniforms, torch.Generator().manual_seed(3)), expected)


def test_a_run_of_the_base_ends_near_the_data() -> None:
    """200 ancestral steps: means within 5 standard errors, and a percent or two for the steps' finite length."""
    world = World(objectives=world_of("distinct", (0.5, 0.5), 10).objectives, weights=(0.5, 0.5), steps=200, base_eta=1)
    x = world.run_rule(get_rule("base"), points(4000), torch.zeros(4000, 200), torch.Generator().manual_seed(1)).numpy()
    mean = DATA.weights @ DATA.means
    variance = DATA.weights @ (DATA.means**2 + DATA.variances[:, None]) - mean**2
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * (variance.max() / 4000) ** 0.5 + 0.02)
    np.testing.assert_allclose(x.var(0), variance, rtol=0.12)


def test_the_distance_of_a_shifted_sample_is_the_shift_over_root_two() -> None:
    """W2 along u is |u·d|, and the mean of (u·d)² over even directions in the plane is |d|²/2."""
    x = points(60).numpy()
    np.testing.assert_allclose(sliced_distance(x + np.array([3.0, 4.0]), x, 3), [5 / 2**0.5] * 3, rtol=1e-12)


# What is measured -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", WEIGHTS[2])
def test_the_product_ends_within_the_sampling_floor_and_the_base_does_not(
    measured: tuple[dict, Path], kind: str, weights: tuple[float, ...]
) -> None:
    cell = cell_of(measured[0], kind, weights)
    assert cell["product_exact"]
    assert cell["product_from_target"] < 1e-9
    assert cell["rules"]["base"]["to_target"]["mean"] > cell["floor"]["bound"]
    assert cell["rules"]["base"]["over_floor"]["low"] > 0


def test_credit_follows_the_blend_more_closely_than_lots_with_equal_variances(measured: tuple[dict, Path]) -> None:
    cell = cell_of(measured[0], "equal")
    assert cell["systematic_coupled_closer"] == "yes"
    assert cell["rules"]["systematic"]["coupled_to_blend"]["high"] < 0.2
    assert cell["rules"]["switch"]["coupled_to_blend"]["low"] > 0.4


def test_with_distinct_variances_picking_ends_at_the_average_step_not_at_the_product(
    measured: tuple[dict, Path],
) -> None:
    cell = cell_of(measured[0], "distinct")
    for name in ("switch", "systematic"):
        rule = cell["rules"][name]
        assert rule["over_floor"]["low"] > 0.1
        assert rule["to_average_step"]["mean"] < rule["to_blend"]["mean"] / 2


def test_the_files_hold_the_result_and_its_verdicts(measured: tuple[dict, Path]) -> None:
    result, folder = measured
    assert sorted(file.name for file in folder.iterdir()) == ["world.json", "world.md"]
    written = json.loads((folder / "world.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert "soup" in written["not_measured"]
    page = (folder / "world.md").read_text()
    assert all(f"- {sentence}" in page for sentence in result["verdicts"])
    assert result["verdicts"][0].startswith("`product` is the exact target in 4 of 4 cells")


def test_a_measurement_repeats_by_its_seed(tmp_path: Path) -> None:
    first, same, other = (
        measure_world(tmp_path, seed=seed, samples=20, replicates=2, objectives=(2,), steps=(2,))["cells"]
        for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 1}, "samples 1; expected 2 or more"),
        ({"replicates": 1}, "replicates 1; expected 2 or more"),
        ({"objectives": (2, 5)}, "objectives 5; expected some of 2, 3, 4"),
        ({"objectives": ()}, "objectives none; expected some of 2, 3, 4"),
        ({"steps": ()}, "steps none; expected one or more"),
        ({"steps": (0,)}, "0 sampling steps; expected 1 to 1000"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_file_is_written(
    tmp_path: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        measure_world(tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_measures_and_prints_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = partial(measure_world, samples=20, replicates=2, objectives=(2,), steps=(2,))  # in full it takes minutes
    monkeypatch.setattr("stepfuse.scripts.oracle_world.measure.measure_world", small)
    main(["evaluate", "--world", "gmm", "--seed", "3", "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().out.strip() == (tmp_path / "out" / "world.md").read_text().strip()
    assert json.loads((tmp_path / "out" / "world.json").read_text())["seed"] == 3
    with pytest.raises(SystemExit, match="not empty"):
        main(["evaluate", "--world", "gmm", "--output_dir", str(tmp_path / "out")])
