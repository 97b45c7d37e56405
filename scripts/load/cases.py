"""Requests of every kind that a server draws, at random."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

SIZES = ("auto",) * 6 + ("64x64", "48x48", "64x32")


def random_case(
    random: random.Random, served: Mapping[str, Any], *, most_steps: int, sizes: Sequence[str]
) -> dict[str, Any]:
    """The fields of one request for images of a set, as `GET /v1/sets` describes it.

    A few are refused, such as an extrapolation that a rule does not have, which is then what every answer must be.
    """
    names = [each["name"] for each in served["objectives"]]
    case: dict[str, Any] = {
        "model": served["name"],
        "prompt": random.choice(served["prompts"]),
        "seed": random.randrange(2**32),
        "steps": random.randint(2, most_steps),
        "size": random.choice(sizes),
        "strength": random.choice((1, 1, 1, 0.5, 0, 1.2)),
    }
    if random.random() < 0.6:
        case["rule"] = random.choice([each["name"] for each in served["rules"]])
    if random.random() < 0.3:
        case |= {"guidance": random.choice(("shared", "full")), "guidance_scale": round(random.uniform(2, 7), 1)}
        if random.random() < 0.5:
            case["negative_prompt"] = random.choice(("", "blurred"))
    if random.random() < 0.2:
        case["weights_on"] = "rewards"
    case["output_format"] = random.choice(("png", "png", "png", "webp", "jpeg"))
    kind = random.random()
    if kind < 0.2:
        case["weights"] = [mixture(random, names) for _ in range(random.randint(2, 4))]
        if random.random() < 0.5:
            case["layout"] = random.choice(("strip", "loop"))
            if case["layout"] == "loop":
                case["output_format"] = random.choice(("gif", "webp"))
    else:
        case["n"] = random.choice((1, 1, 1, 2, 3))
        if kind < 0.9:
            case["weights"] = mixture(random, names)
    return case


def mixture(random: random.Random, names: list[str]) -> dict[str, float] | str:
    """Weights of some objectives, as JSON or as on the command line."""
    weights = {name: round(random.uniform(0.05, 1), 3) for name in random.sample(names, random.randint(1, len(names)))}
    return weights if random.random() < 0.7 else ",".join(f"{name}={weight}" for name, weight in weights.items())


def images_of(case: Mapping[str, Any]) -> int:
    """How many images a request draws."""
    weights = case.get("weights")
    return len(weights) if isinstance(weights, list) else int(case.get("n", 1))
