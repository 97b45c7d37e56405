"""Whether the baselines are here, which only a checkout of the repository has. Importing this does not import torch."""

import importlib.util

NEEDS_CHECKOUT = "comparing with other implementations needs a checkout of the repository"


def has_baselines() -> bool:
    """Whether this is a checkout of the repository; a wheel has no `scripts/baselines`."""
    return importlib.util.find_spec("stepfuse.scripts.baselines") is not None


def require_checkout() -> None:
    if not has_baselines():
        raise ValueError(f"{NEEDS_CHECKOUT}; install stepfuse from one by pip install -e .")
