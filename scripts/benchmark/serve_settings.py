"""Settings of the benchmark of the server, whose fields are options of `stepfuse benchmark serve`. Without torch."""

from dataclasses import dataclass
from functools import partial

from stepfuse.data.seeds import LIMIT
from stepfuse.data.settings_fields import check_settings, setting
from stepfuse.fuse.rules.registry import check_rule_name
from stepfuse.scripts.benchmark.settings import DType

_what, _how = partial(setting, group="what to measure"), partial(setting, group="how to run")


@dataclass(frozen=True, kw_only=True)
class ServeBenchmark:
    """Settings of `benchmark_serve`.

    Attributes:
        model: the adapter set.
    """

    model: str
    requests: int = _what(32, "Requests of one image, each of another mixture of the set's adapters.", least=2)
    rule: str = _what(
        "soup",
        "Fusion rule of the server. The image of set_adapters is that of the soup, with the base's "
        "guidance replaced by that of the adapters.",
        metavar="NAME",
    )
    steps: int | None = _what(None, "Denoising steps (default: those of the set).", least=1)
    rate: float | None = _what(
        None,
        "Requests a second under heavy load (default: 4 times as many as set_adapters can serve, so that all methods "
        "are busy).",
        metavar="RATE",
        above=0,
    )
    light: float = _what(
        0.5, "Requests a second under light load, as a share of what set_adapters can serve.", metavar="SHARE", above=0
    )
    seed: int = _what(0, "Random seed of mixtures and arrivals.", least=0, most=LIMIT - 1)
    repeats: int = _how(3, "Rounds of measurements, of which the median counts.", least=1)
    max_rows: int = _how(16, "Most rows of one forward pass of the server.", least=1)
    threads: int | None = _how(None, "Number of CPU threads (default: as many as torch chooses).", least=1)
    device: str = "cpu"
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        check_settings(self)
        try:
            check_rule_name(self.rule)
        except ValueError as error:
            raise ValueError(f"rule: {error}") from error
