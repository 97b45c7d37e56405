"""A world whose every policy is known in closed form, for holding fusion rules to.

The data are a Gaussian mixture, x_0 ~ Σ_j π_j N(μ_j, s_j² I) in two dimensions, and the noise path is Stable
Diffusion's. Tilting the mixture by exp(h·x_0 - κ |x_0|²/2) gives a mixture again:

    1/s_j'² = 1/s_j² + κ,    μ_j' = s_j'² (μ_j / s_j² + h),
    π_j' ∝ π_j (s_j'/s_j)² exp(|μ_j'|² / 2 s_j'² - |μ_j|² / 2 s_j²)

With h = alpha_t x_t / sigma_t² and κ = alpha_t² / sigma_t² that is p(x_0 | x_t), so E[x_0 | x_t] = Σ_j π_j' μ_j'.

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

from stepfuse.data.names import nearest
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time
from stepfuse.fuse.diffusion.schedulers import STABLE_DIFFUSION
from stepfuse.fuse.diffusion.variance import EtaSchedule, VarianceSchedule
from stepfuse.fuse.lora.mixture import BASE, Network, Rows
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.plan import Expert, Plan
from stepfuse.fuse.rules.run import Run
from stepfuse.fuse.rules.step import FusionStep, Score

DIM = 2


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Σ_j π_j N(μ_j, s_j² I).

    Attributes:
        weights: π_j, summing to 1.
        means: μ_j, (components, dimensions).
        variances: s_j².
    """

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def shares(self, slope: np.ndarray, curvature: float) -> np.ndarray:
        """π_j' of the tilt by exp(slope·x - curvature |x|²/2), a row for each of slope's."""
        tilted, squares = self.tilted_variances(curvature), (self.means**2).sum(1)
        # |μ_j'|² / s_j'² = s_j'² |μ_j / s_j² + slope|², multiplied out: a matrix product is far faster than the square.
        constant = np.log(self.weights) + (self.means.shape[1] * np.log(tilted / self.variances)) / 2
        constant += squares * (tilted / self.variances - 1) / self.variances / 2
        logits = slope @ (self.means * (tilted / self.variances)[:, None]).T + constant
        logits += (slope**2).sum(-1, keepdims=True) * tilted / 2
        logits -= logits.max(-1, keepdims=True)
        np.exp(logits, out=logits)
        return logits / logits.sum(-1, keepdims=True)

    def tilted_variances(self, curvature: float) -> np.ndarray:
        """s_j'²."""
        return 1 / (1 / self.variances + curvature)

    def tilted_mean(self, slope: np.ndarray, curvature: float) -> np.ndarray:
        """Σ_j π_j' μ_j' = Σ_j π_j' s_j'² μ_j / s_j² + slope Σ_j π_j' s_j'², a row for each of slope's."""
        scaled = self.shares(slope, curvature) * self.tilted_variances(curvature)
        return scaled @ (self.means / self.variances[:, None]) + slope * scaled.sum(-1, keepdims=True)

    def tilted(self, slope: np.ndarray, curvature: float) -> "Mixture":
        """The mixture ∝ p(x) exp(slope·x - curvature |x|²/2), for one slope."""
        variances = self.tilted_variances(curvature)
        means = variances[:, None] * (self.means / self.variances[:, None] + slope)
        return Mixture(weights=self.shares(slope, curvature), means=means, variances=variances)

    def sample(self, count: int, random: np.random.Generator) -> np.ndarray:
        which = random.choice(len(self.weights), size=count, p=self.weights)
        noise = random.standard_normal((count, self.means.shape[1]))
        return self.means[which] + np.sqrt(self.variances[which])[:, None] * noise


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
    """The data, objectives with their policies, a number of steps and weights.

    Attributes:
        objectives: of the policies.
        weights: w_i, summing to 1.
        steps: the number of denoising steps.
        base_eta: of the base.
    """

    objectives: Sequence[Objective]
    weights: Sequence[float]
    steps: int
    base_eta: float
    data: Mixture = DATA

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
        return self.data.tilted_mean(square**0.5 / (1 - square) * x_t, square / (1 - square))

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
        pairs = list(zip(self.weights, self.objectives, strict=True))
        precision = sum(w * self.precision(objective, t, s) for w, objective in pairs)
        linear = sum(w * self.linear(objective, x_t, noise, t, s) for w, objective in pairs)
        variance = torch.full((1, 1), 1 / precision, dtype=torch.float64)
        return Gaussian(mean=torch.from_numpy(linear / precision), variance=variance)

    def tilted_data(self) -> Mixture:
        """p_w(x_0) ∝ p(x_0) exp(Σ w_i q_i(x_0))."""
        pairs = list(zip(self.weights, self.objectives, strict=True))
        slope = np.sum([w * (np.array(o.slope) + o.curvature * np.array(o.centre)) for w, o in pairs], axis=0)
        return self.data.tilted(slope, sum(w * o.curvature for w, o in pairs))

    def draw_tilted_data(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Draws of p_w at the noise that a run ends on: alpha_final x_0 + sigma_final e."""
        noise = random.standard_normal((count, DIM))
        return (
            self.squares[-1] ** 0.5 * self.tilted_data().sample(count, random) + (1 - self.squares[-1]) ** 0.5 * noise
        )

    # What the package is given ----------------------------------------------------------------

    def plan(self, batch: int) -> Plan:
        """The run as the package's rules see it."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        schedules: list[VarianceSchedule] = [
            AlignedSchedule(self, objective) if objective.curvature else EtaSchedule(eta=objective.eta)
            for objective in self.objectives
        ]
        return Plan(
            path=self.path,
            steps=self.times,
            objectives=[Expert.adapter(name, schedule) for name, schedule in zip(self.names, schedules, strict=True)],
            base=Expert.base(EtaSchedule(eta=self.base_eta)),
            weights=weights[None, :, None].expand(self.steps, -1, batch),
            strength=1.0,
        )

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
            if network.merge:
                raise ValueError("this world has no network whose weights could be merged")
            if network == BASE:
                predictions.append(torch.from_numpy(noise))
                continue
            objective = self.objectives[self.names.index(str(network.adapter))]
            v = 1 / self.precision(objective, t, s)
            mean = v * self.linear(objective, x, noise, t, s)
            gain = (1 - square_s - v) ** 0.5 - shrink * (1 - square_t) ** 0.5
            predictions.append(torch.from_numpy((mean - shrink * x) / gain))
        return [e if some is None else e[some] for e, some in zip(predictions, rows, strict=True)]

    def rewards(self) -> list[Score]:
        """q_i of x_0, for rules that need rewards."""
        return [objective.reward for objective in self.objectives]

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

    def run(self, rule: FusionRule, batch: int) -> Run:
        """What this world offers to a rule."""
        return Run(
            plan=rule.prepare(self.plan(batch)),
            predict_fn=self.predict,
            rewards=self.rewards(),
            scales=[1.0] * len(self.weights),
        )


class AverageStep(FusionRule):
    """N(Σ a_i m_i, Σ a_i v_i): the step of the policies' mixture in its first two moments.

    What picking one expert a step with probability a_i becomes as steps get short: drifts and variances add up over
    time. It is `product` for equal variances alone; `average_noise` averages noises, whose share in m_i depends on v_i.
    """

    def fuse(self, step: FusionStep) -> Gaussian:
        used = step.used
        predictions, exponents = step.predict_used(used), step.exponents(used)[:, :, None]
        gaussians = [step.transition(e, step.variance(i)) for e, i in zip(predictions, used, strict=True)]
        mean = sum(a * gaussian.mean for a, gaussian in zip(exponents, gaussians, strict=True))
        variance = sum(a * gaussian.variance for a, gaussian in zip(exponents, gaussians, strict=True))
        return Gaussian(mean=mean, variance=variance)


def world_of(variances: str, weights: Sequence[float], steps: int) -> World:
    """The world with as many objectives as weights.

    Raises:
        ValueError: for a number of objectives that is not 2 to 4, or variances of another name.
    """
    if variances not in OBJECTIVES:
        raise ValueError(
            f"variances {variances!r}; expected one of {', '.join(OBJECTIVES)}{nearest(variances, OBJECTIVES)}"
        )
    if not 2 <= len(weights) <= len(OBJECTIVES[variances]):
        raise ValueError(f"{len(weights)} objectives; expected 2 to {len(OBJECTIVES[variances])}")
    return World(
        objectives=OBJECTIVES[variances][: len(weights)],
        weights=weights,
        steps=steps,
        base_eta=BASE_ETA[variances],
    )
