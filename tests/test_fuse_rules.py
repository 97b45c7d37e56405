"""Fusion rules in closed form: names and options, rewards while sampling, and how far strengths may extrapolate."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from stepfuse.fuse.diffusion.gaussian import Gaussian, product
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.rules.best_of_n import CoDe
from stepfuse.fuse.rules.checks import largest_strength
from stepfuse.fuse.rules.plan import Expert, Plan
from stepfuse.fuse.rules.product import Product
from stepfuse.fuse.rules.registry import RULES, get_rule
from stepfuse.fuse.rules.reward_gradient import RewardGradientGuidance
from stepfuse.fuse.rules.run import Run, uniform_numbers
from tests.fixtures_tiny import ddim, generators, refused


def test_rules_go_by_name():
    assert get_rule("product") == Product()
    with pytest.raises(ValueError, match="no fusion rule 'sum'; expected one of base, product"):
        get_rule("sum")


@pytest.mark.parametrize(
    ("name", "options", "culprits"),
    [
        ("sum", {}, ["'sum'", "product"]),
        ("code", {"candidate": 3}, ["'candidate'", "candidates, block_size"]),
        ("product", {"growth": 1}, ["'growth'", "gate"]),
        ("soup", {"gate": 1}, ["'gate'", "none"]),
        ("product", {"gate": -1.0}, ["gate is -1.0", "0 or more"]),
        ("product", {"gate": "small"}, ["gate is 'small'"]),
        ("code", {"candidates": 0}, ["candidates is 0", "1 or more"]),
        ("code", {"block_size": 2.5}, ["block_size is 2.5"]),
        ("rgg", {"growth": -1}, ["growth is -1", "a positive number"]),
        ("rgg", {"growth": "1e-2"}, ["growth is '1e-2'"]),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_rules_and_options_that_are_not_there_are_named(name, options, culprits):
    with refused(*culprits):
        get_rule(name, **options)


MINE = """
from dataclasses import dataclass
from stepfuse import FusionRule
from stepfuse.data.settings_fields import setting

@dataclass(frozen=True)
class Mine(FusionRule):
    count: int = setting(3, "How many.", least=1)

def function():
    return Mine()
"""


def test_an_option_of_another_rule_is_refused_with_the_rule_that_has_it():
    """As `stepfuse sample SET --gate 0.4` gives it to the default rule of a jointly trained set."""
    with refused("rule soup has no option 'gate', an option of the rule product; it has none"):
        get_rule("soup", gate=0.4)


def test_rules_of_a_file_have_its_options(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    name = f"{tmp_path}/mine.py:Mine"
    rule = get_rule(name, count=2)
    assert (rule.name, rule.count) == ("Mine", 2)
    assert rule == get_rule(name, count=2) != get_rule(name)
    with refused("count is 0; expected 1 or more"):
        get_rule(name, count=0)
    with refused("no option 'cont'", "'count'"):
        get_rule(name, cont=1)


@pytest.mark.parametrize(
    ("name", "culprits"),
    [
        ("mine.py", ["mine.py:CLASS"]),
        ("yours.py:Mine", ["no file 'yours.py'"]),
        ("mine.py:Minor", ["no function or class 'Minor'", "'Mine'"]),
        ("mine.py:function", ["mine.py:function", "FusionRule"]),
        ("mine.py:dataclass", ["mine.py:dataclass", "FusionRule"]),
    ],
)
def test_rules_that_are_not_in_a_file_are_named(name, culprits, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    with refused(*culprits):
        get_rule(name)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_calls_itself_what_the_registry_calls_it(name):
    assert get_rule(name).name == name


def test_rules_without_a_name_are_called_as_their_class():
    class Mine(Product):
        pass

    assert Mine.name == "Mine"
    assert Mine(gate=0.5) != Product(gate=0.5)


def test_rules_say_how_they_merge_adapters():
    assert [get_rule(name).merges for name in ("product", "soup", "soup_factors")] == ["", "weights", "factors"]
    assert get_rule("product", gate=0.4).merges == "weights"


def test_rules_are_listed_without_torch_and_imported_when_asked_for():
    code = (
        "import sys\n"
        "from stepfuse.fuse.rules.registry import RULES\n"
        "assert 'kl' in RULES and len([*RULES]) == 11\n"
        "assert 'torch' not in sys.modules and 'stepfuse.fuse.rules.product' not in sys.modules\n"
        "assert RULES['kl'].__name__ == 'KL' and 'stepfuse.fuse.rules.product' in sys.modules\n"
        "assert 'stepfuse.fuse.rules.averages' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_says_its_cost_and_whether_it_needs_a_reward(name):
    text = " ".join(RULES[name].__doc__.split())
    assert "Cost: " in text
    assert "Needs no reward" in text or "Needs rewards" in text or "Needs differentiable rewards" in text


# Checks before a run


class Wide(EtaSchedule):
    """A schedule whose later steps have 30 times the ancestral variance."""

    def relative(self, path, t, s, like):
        return like.new_full([1] * like.ndim, 30.0 if t < 500 else 1.0)


def test_a_schedule_beyond_the_path_is_refused_before_the_run():
    path = NoisePath.from_scheduler(ddim())
    steps = path.steps(4)
    ratios = [path.ancestral_variance(t, s, torch.zeros(1)) / path.at(s, torch.zeros(1))[1] ** 2 for t, s in steps]
    first = next(k for k, ((t, _), ratio) in enumerate(zip(steps, ratios, strict=True)) if t < 500 and 30 * ratio > 1)
    plan = Plan(
        path=path,
        steps=steps,
        objectives=[Expert.adapter("a", EtaSchedule()), Expert.adapter("b", Wide())],
        base=Expert.base(EtaSchedule()),
        weights=torch.full((4, 2, 1), 0.5, dtype=torch.float64),
        strength=1.0,
    )
    with refused("'b'", f"step {first + 1} of 4", "sigma_s²"):
        plan.check_variances()


# Rewards while sampling


def toy_run(rule, rewards, *, steps, images=2, observe=None):
    """A run in 1×2 latents of an exact denoiser: data at 0, so e = x_t / sigma."""
    path = NoisePath.from_scheduler(ddim())
    plan = Plan(
        path=path,
        steps=path.steps(steps),
        objectives=[Expert.adapter(name, EtaSchedule()) for name in "ab"],
        base=Expert.base(EtaSchedule()),
        weights=torch.tensor([0.75, 0.25], dtype=torch.float64)[None, :, None].expand(steps, 2, images),
        strength=1.0,
    )

    def predict(x_t, t, networks, images, rows):
        return [x_t / (1 + path.at(t, x_t)[1]) for _ in networks]

    return Run(plan=rule.prepare(plan), predict_fn=predict, rewards=rewards, scales=[1.0, 2.0], observe=observe)


def test_code_keeps_the_candidate_with_the_largest_weighted_scaled_reward():
    """Σ w_i r_i / σ_i = 0.75 x + 0.25 · 10 y / 2 over the candidates of each block; the last block's are x_0 itself."""
    seen = []

    def first(clean, rows):
        seen.append((clean.clone(), rows.clone()))
        return clean[:, 0]

    rule = CoDe(candidates=5, block_size=2)
    run = toy_run(rule, [first, lambda clean, rows: 10 * clean[:, 1]], steps=4)
    x_0 = rule.denoise(run, torch.randn(2, 2, generator=torch.Generator().manual_seed(0)), generators(0, 1))
    assert len(seen) == 2  # two blocks
    clean, rows = seen[-1]
    assert rows.tolist() == [0] * 5 + [1] * 5
    value = 0.75 * clean[:, 0] + 0.25 * 10 * clean[:, 1] / 2
    best = torch.stack([clean[value[:5].argmax()], clean[5 + value[5:].argmax()]])
    assert torch.equal(x_0, best)
    assert len(value.unique()) == 10


@pytest.mark.parametrize("number", [0, 1, 3])
def test_reward_gradient_guidance_moves_the_mean_along_the_normalised_gradient(number):
    """m + λ v (0.75 g_a + 0.25 g_b), λ = 1.024^(50 k / 4) - 1 up to 1; g of 3 x + 4 y is (0.6, 0.8), of -y (0, -1)."""
    rewards = [lambda clean, rows: 3 * clean[:, 0] + 4 * clean[:, 1], lambda clean, rows: -clean[:, 1]]
    rule = RewardGradientGuidance()
    run = toy_run(rule, rewards, steps=4)
    x_t = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    step = run.step(number, x_t, uniform_numbers(run.plan, generators(0, 1)))
    guided, plain = rule.fuse(step), step.gaussian(run.plan.base)
    factor = {0: 0.0, 1: 1.024**12.5 - 1, 3: 1.0}[number]  # 1.024^37.5 - 1 is 1.43
    expected = factor * plain.variance * torch.tensor([[0.75 * 0.6, 0.75 * 0.8 - 0.25]])
    torch.testing.assert_close(guided.mean - plain.mean, expected.expand(2, 2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(guided.variance, plain.variance)


# How far a strength may go

WEIGHTS = torch.tensor([[0.6, 1.0, 0.0, 1.5], [0.4, 0.0, 1.0, -0.5]], dtype=torch.float64)
ANCESTRAL = 0.02  # any one number: it scales every variance of a step alike


def fuse(strength, column, relative_variances, reference):
    """The product at one strength: objectives with λ w_i, the base with 1 - λ."""
    gaussians = [
        Gaussian(
            mean=torch.full((1, 2), float(i), dtype=torch.float64),
            variance=torch.tensor([[r * ANCESTRAL]], dtype=torch.float64),
        )
        for i, r in enumerate([*relative_variances.tolist(), reference])
    ]
    return product(gaussians, torch.cat([strength * column, torch.tensor([1 - strength], dtype=torch.float64)]))


def is_valid(*args):
    """Whether the product exists; an error about anything but the precision is a failure."""
    try:
        fuse(*args)
    except ValueError as error:
        if "must be positive" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("r", "reference"), [((1.0, 0.64), 0.25), ((0.25, 0.64), 1.0), ((0.5, 0.5), 0.5), ((0.09, 1.0), 0.3)]
)
def test_the_largest_strength_is_where_a_scan_stops(r, reference):
    relative_variances = torch.tensor(r, dtype=torch.float64)
    limits = largest_strength(WEIGHTS, relative_variances, reference)
    for column, limit in zip(WEIGHTS.T, limits.tolist(), strict=True):
        for strength in np.linspace(0, 5, 101).tolist():
            assert is_valid(strength, column, relative_variances, reference) == (strength < limit)
        if math.isfinite(limit):
            assert is_valid(limit * (1 - 1e-9), column, relative_variances, reference)
            assert not is_valid(limit * (1 + 1e-9), column, relative_variances, reference)
        else:
            assert is_valid(1e6, column, relative_variances, reference)


def test_the_largest_strength_of_one_objective_by_hand():
    """1/v* = (1 - λ) / 0.25 + λ / 1 = 4 - 3 λ, which is positive up to λ = 4/3."""
    limit = largest_strength(torch.ones(1, 1, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64), 0.25)
    assert limit.item() == pytest.approx(4 / 3, rel=1e-14)
