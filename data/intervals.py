"""Numbers and 95 % intervals as text, in as many digits as they warrant."""

from math import floor, isfinite, log10

ROUNDING = 1e-12  # sums of the same values in another order differ by less


def decimals(value: float, half_width: float | None = None) -> int:
    """Two significant digits of the half width of an interval, or three of the value where it has none."""
    size, digits = (half_width, 2) if half_width and half_width > 1e-9 * abs(value) else (abs(value), 3)
    return min(max(0, digits - 1 - floor(log10(size))), 6) if size and isfinite(size) else 0


def number_text(value: float, places: int | None = None) -> str:
    """A number with these decimals, by default as many as give three significant digits, without trailing zeros."""
    text = f"{value:.{decimals(value) if places is None else places}f}"
    if places is None and "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def interval_text(interval: dict | None, *, signed: bool = False) -> str:
    """An interval as "0.30 [0.25, 0.36]", in as many digits as its width warrants."""
    if interval is None:
        return "unknown"
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    known = low is not None and high is not None
    places = decimals(mean, (high - low) / 2 if known else None)
    if known and excludes_zero(interval) and not round(min(abs(low), abs(high)), places):
        places += 1  # a bound that is not 0 is not written as 0
    form = f"{'+' if signed else ''}.{places}f"
    text = f"{mean:{form}} [{low:{form}}, {high:{form}}]" if known else f"{mean:{form}}"
    return text.replace("-", "−")


def excludes_zero(interval: dict) -> bool:
    return interval["low"] is not None and (interval["low"] > ROUNDING or interval["high"] < -ROUNDING)


def half_lengths(interval: dict) -> tuple[float, float]:
    """How far an interval reaches below and above its mean; 0 where it does not, as by rounding."""
    return max(0.0, interval["mean"] - interval["low"]), max(0.0, interval["high"] - interval["mean"])
