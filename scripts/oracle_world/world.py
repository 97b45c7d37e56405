"""A world whose every policy is known in closed form, for holding fusion rules to.

The data are a Gaussian mixture in two dimensions, and the noise path is Stable Diffusion's. p(x_0 | x_t) is the mixture
tilted by h = alpha_t x_t / sigma_t² and κ = alpha_t² / sigma_t² (`mixture.py`), so E[x_0 | x_t] = Σ_j π_j' μ_j'.

Objective i has the reward q_i(x) = g_i·x - k_i |x - c_i|²/2, and at the step from t to s (DDIM, arXiv:2010.02502,
eq. 12 and 16, under the objective's own eta: mean m_i, variance v_i) the step reward

    Q_i(x_s) = f_s (g_i·x_s - k_i |x_s - alpha_s c_i|²/2),    f_s = alpha_s / Σ_steps alpha_s v_ancestral

whose tilt over a run is of about one size for any number of steps. Held at beta_i, p_i ∝ p_ref,i exp(Q_i / beta_i) is
Gaussian: log p_i = -P_i |x_s|²/2 + x_s·l_i + const, with

    P_i = 1/v_i + f_s k_i / beta_i,    l_i = m_i / v_i + f_s (g_i + k_i alpha_s c_i) / beta_i

and the target of weights w at this step, p* ∝ Π p_i^(w_i), has P* = Σ w_i P_i and l* = Σ w_i l_i. Only the mixture's
posterior and these two sums make the target: the package's rules see predicted noises and variance schedules alone.

The rewards tilt the data as well, p_w(x_0) ∝ p(x_0) exp(Σ w_i q_i(x_0)), another mixture, and the target of RL on whole
runs. It is not where the step-level target ends. `code` and `rgg` use rewards of x_0, but neither has p_w as its law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time
from stepfuse.fuse.diffusion.schedulers import STABLE_DIFFUSION
from stepfuse.fuse.diffusion.variance import EtaSchedule, VarianceSchedule
from stepfuse.fuse.lora.mixture import BASE, Network, Rows
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.plan import Expert, Plan
from stepfuse.fuse.rules.run import Run
from stepfuse.fuse.rules.step import FusionStep
from stepfuse.scripts.oracle_world.mixture import Mixture

DIM = 2
DATA = Mixture(
    weights=np.array([0.3, 0.25, 0.2, 0.15, 0.1]),
    means=np.array([[0.0, 0.0], [2.0, 0.5], [0.3, 1.9], [-1.6, 0.9], [-0.6, -1.8]]),
    variances=np.array([0.25, 0.16, 0.2, 0.3, 0.12]),
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """q(x) = slope·x - curvature |x - centre|²/2, held at temperature beta under the base's transition at this eta."""

    eta: float
    beta: float
    slope: tuple[float, float] = (0.0, 0.0)
    curvature: float = 0.0
    centre: tuple[float, float] = (0.0, 0.0)

    def reward(self, x: Tensor, images: Rows) -> Tensor:
        """q of points, one a row."""
        away = ((x - x.new_tensor(self.centre)) ** 2).sum(1)
        return x @ x.new_tensor(self.slope) - self.curvature * away / 2


# A linear tilt moves a step by v g / beta: a beta in proportion to eta² makes those of all objectives alike.
OBJECTIVES: dict[str, tuple[Objective, ...]] = {
    "equal": (
        Objective(eta=0.8, beta=0.64, slope=(2.0, -0.5)),
        Objective(eta=0.8, beta=0.64, slope=(-1.0, 1.8)),
        Objective(eta=0.8, beta=0.64, slope=(-0.8, -1.8)),
        Objective(eta=0.8, beta=0.64, slope=(-2.0, 0.3)),
    ),
    "distinct": (
        Objective(eta=1.0, beta=1.0, slope=(2.0, -0.5)),
        Objective(eta=0.5, beta=0.25, slope=(0.3, 0.6), curvature=1.0, centre=(-1.0, 1.2)),
        Objective(eta=0.8, beta=0.64, slope=(-0.8, -1.8)),
        Objective(eta=0.3, beta=0.09, curvature=1.0, centre=(-1.6, 0.9)),
    ),
}
BASE_ETA = {"equal": 0.8, "distinct": 1.0}


@dataclass(frozen=True)
class AlignedSchedule(VarianceSchedule):
    """r_i = 1 / (P_i v_ancestral): the variance of an aligned policy, which a quadratic reward narrows."""

    world: "World"
    objective: Objective

    def relative(self, path: NoisePath, t: Time, s: Time, like: Tensor) -> Tensor:
        r = 1 / (self.world.precision(self.objective, int(t), int(s)) * self.world.ancestral(int(t), int(s)))
        return like.new_full((1,) * like.ndim, r)


@dataclass(frozen=True, kw_only=True)
class World:
    """Objectives with their policies and weights w_i that sum to 1, and a number of denoising steps."""

    objectives: Sequence[Objective]
    weights: Sequence[float]
    steps: int
    base_eta: float

    @cached_property
    def squares(self) -> np.ndarray:
        """alpha_t² by position, the final one last, from diffusers."""
        scheduler = DDIMScheduler(**STABLE_DIFFUSION)
        return np.append(scheduler.alphas_cumprod.double().numpy(), scheduler.final_alpha_cumprod.double().item())

    @cached_property
    def path(self) -> NoisePath:
        return NoisePath.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION))

    @cached_property
    def times(self) -> list[tuple[int, int]]:
        """(t, s) of each step."""
        return [(int(t), int(s)) for t, s in self.path.steps(self.steps)]

    @cached_property
    def _tilt_scale(self) -> float:
        return 1 / sum(self.squares[s] ** 0.5 * self.ancestral(t, s) for t, s in self.times)

    @property
    def _weighted(self) -> list[tuple[float, Objective]]:
        return list(zip(self.weights, self.objectives, strict=True))

    # The closed form --------------------------------------------------------------------------

    def ancestral(self, t: int, s: int) -> float:
        """(1 - ᾱ_s) / (1 - ᾱ_t) (1 - ᾱ_t / ᾱ_s): DDIM, eq. 16 with eta 1."""
        a_t, a_s = self.squares[t], self.squares[s]
        return (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)

    def tilt(self, s: int) -> float:
        """f_s."""
        return self.squares[s] ** 0.5 * self._tilt_scale

    def clean(self, x_t: np.ndarray, t: int) -> np.ndarray:
        """E[x_0 | x_t]."""
        square = self.squares[t]
        return DATA.tilted_mean(square**0.5 / (1 - square) * x_t, square / (1 - square))

    def noise(self, x_t: np.ndarray, t: int) -> np.ndarray:
        """E[e | x_t] = (x_t - alpha_t E[x_0 | x_t]) / sigma_t."""
        square = self.squares[t]
        return (x_t - square**0.5 * self.clean(x_t, t)) / (1 - square) ** 0.5

    def precision(self, objective: Objective, t: int, s: int) -> float:
        """P_i."""
        return 1 / (objective.eta**2 * self.ancestral(t, s)) + self.tilt(s) * objective.curvature / objective.beta

    def linear(self, objective: Objective, x_t: np.ndarray, noise: np.ndarray, t: int, s: int) -> np.ndarray:
        """l_i: m_i / v_i of DDIM, eq. 12, and the slope of Q_i / beta_i at 0."""
        v, square_t, square_s = objective.eta**2 * self.ancestral(t, s), self.squares[t], self.squares[s]
        clean = (x_t - (1 - square_t) ** 0.5 * noise) / square_t**0.5
        mean = square_s**0.5 * clean + (1 - square_s - v) ** 0.5 * noise
        pull = np.array(objective.slope) + objective.curvature * square_s**0.5 * np.array(objective.centre)
        return mean / v + self.tilt(s) / objective.beta * pull

    def target(self, x_t: np.ndarray, t: int, s: int) -> Gaussian:
        """p*(x_s | x_t): the sums of the weighted policies' precisions and linear terms, the square completed."""
        noise = self.noise(x_t, t)
        precision = sum(w * self.precision(objective, t, s) for w, objective in self._weighted)
        linear = sum(w * self.linear(objective, x_t, noise, t, s) for w, objective in self._weighted)
        variance = torch.full((1, 1), 1 / precision, dtype=torch.float64)
        return Gaussian(mean=torch.from_numpy(linear / precision), variance=variance)

    def tilted_data(self) -> Mixture:
        """p_w(x_0) ∝ p(x_0) exp(Σ w_i q_i(x_0))."""
        slopes = [w * (np.array(o.slope) + o.curvature * np.array(o.centre)) for w, o in self._weighted]
        return DATA.tilted(np.sum(slopes, axis=0), sum(w * o.curvature for w, o in self._weighted))

    def draw_tilted_data(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Draws of p_w at the noise that a run ends on: alpha_final x_0 + sigma_final e."""
        noise, square = random.standard_normal((count, DIM)), self.squares[-1]
        return square**0.5 * self.tilted_data().sample(count, random) + (1 - square) ** 0.5 * noise

    # What the package is given ----------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return [f"objective {i + 1}" for i in range(len(self.objectives))]

    def predict(
        self, x_t: Tensor, t: Time, networks: Sequence[Network], images: Rows, rows: Sequence[Rows | None]
    ) -> list[Tensor]:
        """The noises whose transition is p_i: m = a x_t + (sqrt(sigma_s² - v) - a sigma_t) e, a = alpha_s / alpha_t."""
        x, t, s = x_t.numpy(), int(t), dict(self.times)[int(t)]
        square_t, square_s = self.squares[t], self.squares[s]
        shrink, noise, predictions = (square_s / square_t) ** 0.5, self.noise(x, t), []
        for network in networks:
            if network == BASE:
                predictions.append(torch.from_numpy(noise))
                continue
            objective = self.objectives[self.names.index(str(network.adapter))]
            v = 1 / self.precision(objective, t, s)
            mean = v * self.linear(objective, x, noise, t, s)
            gain = (1 - square_s - v) ** 0.5 - shrink * (1 - square_t) ** 0.5
            predictions.append(torch.from_numpy((mean - shrink * x) / gain))
        return [e if some is None else e[some] for e, some in zip(predictions, rows, strict=True)]

    def run(self, rule: FusionRule, batch: int) -> Run:
        """What this world offers to a rule."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        schedules: list[VarianceSchedule] = [
            AlignedSchedule(self, objective) if objective.curvature else EtaSchedule(eta=objective.eta)
            for objective in self.objectives
        ]
        plan = Plan(
            path=self.path,
            steps=self.times,
            objectives=[Expert.adapter(name, schedule) for name, schedule in zip(self.names, schedules, strict=True)],
            base=Expert.base(EtaSchedule(eta=self.base_eta)),
            weights=weights[None, :, None].expand(self.steps, -1, batch),
            strength=1.0,
        )
        rewards, scales = [objective.reward for objective in self.objectives], [1.0] * len(self.weights)
        return Run(plan=rule.prepare(plan), predict_fn=self.predict, rewards=rewards, scales=scales)

    def run_target(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x_0 of the target policy from x_T."""
        for t, s in self.times:
            x = self.target(x.numpy(), t, s).sample(generator)
        return x

    def run_rule(self, rule: FusionRule, x: Tensor, uniforms: Tensor, generator: torch.Generator) -> Tensor:
        """x_0 of a rule from x_T: as `FusionRule.denoise`, with one generator for the whole batch."""
        run = self.run(rule, len(x))
        for k in range(self.steps):
            x = rule.fuse(run.step(k, x, uniforms)).sample(generator)
        return x


class AverageStep(FusionRule):
    """N(Σ a_i m_i, Σ a_i v_i): the step of the policies' mixture in its first two moments.

    What picking one expert a step with probability a_i becomes as steps get short: drifts and variances add up over
    time. It is `product` for equal variances alone; `average_noise` averages noises, whose share in m_i depends on v_i.
    """

    def fuse(self, step: FusionStep) -> Gaussian:
        used = step.used
        networks, rows = zip(*step.used_networks(used), strict=True)
        predictions, exponents = step.predict(networks, rows), step.exponents(used)[:, :, None]
        variances = [step.variance(expert) for expert in used]
        means = [step.transition(e, v).mean for e, v in zip(predictions, variances, strict=True)]
        mean, variance = ((exponents * torch.stack(moments)).sum(0) for moments in (means, variances))
        return Gaussian(mean=mean, variance=variance)


def world_of(variances: str, weights: Sequence[float], steps: int) -> World:
    """The world of `variances`, "equal" or "distinct", with as many objectives as weights, 2 to 4."""
    objectives = OBJECTIVES[variances][: len(weights)]
    return World(objectives=objectives, weights=weights, steps=steps, base_eta=BASE_ETA[variances])
