"""One transition for every model: from a prediction to the Gaussian of the next latent."""

from torch import Tensor

from stepfuse.data.devices import on_host
from stepfuse.fuse.diffusion.gaussian import Gaussian, Latents, at_least_float32, root
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time


def transition(path: NoisePath, x_t: Latents, prediction: Latents, t: Time, s: Time, variance: Tensor) -> Gaussian:
    """p(x_s | x_t) = N( alpha_s x_0 + sqrt(sigma_s² - v) e,  v ), with (x_0, e) from the guided prediction at (x_t, t).

    DDIM (arXiv:2010.02502, eq. 12) is the DDPM-type case. Times are one, or one a sample; the variance v broadcasts
    against x_t.

    Raises:
        ValueError: for v outside [0, sigma_s²], where it is on the host. What is on a GPU is not read, for the host
            would wait at every step: `Plan.check_variances` checks it beforehand.
    """
    x_0, e = path.clean_and_noise(x_t, prediction, t)
    alpha_s, sigma_s = path.at(s, x_0)
    v = at_least_float32(variance).to(x_0)
    left = sigma_s**2 - v
    if on_host(left) and not bool(((v >= 0) & (left >= -1e-6 * sigma_s**2)).all()):
        raise ValueError(
            f"a step variance of {v.detach().min().item():g} to {v.detach().max().item():g} "
            f"where the path allows 0 to sigma_s² = {sigma_s.min().item() ** 2:g}"
        )
    return Gaussian(mean=alpha_s * x_0 + root(left) * e, variance=v)
