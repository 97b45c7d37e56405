"""Gaussian mixtures, and their tilts by quadratic exponents, which are mixtures again.

Tilting Σ_j π_j N(μ_j, s_j² I) in two dimensions by exp(h·x - κ |x|²/2) gives

    1/s_j'² = 1/s_j² + κ,    μ_j' = s_j'² (μ_j / s_j² + h),
    π_j' ∝ π_j (s_j'/s_j)² exp(|μ_j'|² / 2 s_j'² - |μ_j|² / 2 s_j²)
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Σ_j π_j N(μ_j, s_j² I)."""

    weights: np.ndarray  # π_j, summing to 1
    means: np.ndarray  # μ_j, (components, dimensions)
    variances: np.ndarray  # s_j²

    def tilted_weights(self, slope: np.ndarray, curvature: float) -> np.ndarray:
        """π_j', a row for each of h = slope; κ = curvature."""
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
        scaled = self.tilted_weights(slope, curvature) * self.tilted_variances(curvature)
        return scaled @ (self.means / self.variances[:, None]) + slope * scaled.sum(-1, keepdims=True)

    def tilted(self, slope: np.ndarray, curvature: float) -> "Mixture":
        """The tilt by one slope."""
        variances = self.tilted_variances(curvature)
        means = variances[:, None] * (self.means / self.variances[:, None] + slope)
        return Mixture(weights=self.tilted_weights(slope, curvature), means=means, variances=variances)

    def sample(self, count: int, random: np.random.Generator) -> np.ndarray:
        which = random.choice(len(self.weights), size=count, p=self.weights)
        noise = random.standard_normal((count, self.means.shape[1]))
        return self.means[which] + np.sqrt(self.variances[which])[:, None] * noise
