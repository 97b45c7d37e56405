"""Options of fusion rules that are flags of `stepfuse sample` too, declared once. Nothing here imports torch.

A rule inherits its options, and the command line reads them from here.
"""

from dataclasses import dataclass

from stepfuse.data.settings_fields import setting


@dataclass(frozen=True)
class ProductOptions:
    """Options of the rule `product`."""

    gate: float | None = setting(
        None,
        "At steps where the soup is at most this KL divergence from the product, run one merged network in place of "
        "all adapters, such as 0.4. It needs a set measured by `stepfuse set profile`, or is `inf`, which runs one "
        "network at every step (default: run all adapters at every step).",
        metavar="NATS",
        least=0,
        finite=False,
    )


@dataclass(frozen=True)
class BestOfNOptions:
    """Options of the rule `code`."""

    candidates: int = setting(20, "Candidates of each block.", least=1)
    block_size: int = setting(5, "Denoising steps of a block.", least=1)


RULE_OPTIONS: dict[str, type] = {"product": ProductOptions, "code": BestOfNOptions}
