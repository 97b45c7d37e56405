"""Networks from published files: transformers' models with exactly these weights, and the head two rewards share."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.data.text_files import read_text


def read_json(file: Path) -> dict[str, Any]:
    """The object in a published JSON file.

    Raises:
        ValueError: for a file that holds none.
    """
    try:
        values = json.loads(read_text(file))
    except ValueError as error:  # JSONDecodeError is one
        raise ValueError(f"{file} is not JSON ({error}); delete it and download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object; delete it and download it again")
    return values


def read_config(file: Path, kind: Any) -> Any:
    """A transformers configuration from a file of the published repository.

    Raises:
        ValueError: for a file that is none.
    """
    values = read_json(file)
    try:
        return kind.from_dict(values)
    except Exception as error:  # transformers' own checks raise what they like
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{file} is no configuration ({reason}); delete it and download it again") from error


def load_model(
    kind: Any, config: Any, state: dict[str, Tensor], file: Path, *, superfluous: tuple[str, ...] = (), **options: Any
) -> Any:
    """A transformers model of this kind with exactly these weights, in float32 on the CPU.

    Args:
        superfluous: how the names begin that the file may have besides.

    Raises:
        ValueError: naming the file and a tensor that is missing, unexpected or of another shape.
    """
    # A buffer in older files, computed now.
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(superfluous)}
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        **options,
    )
    for problem in ("missing", "unexpected", "mismatched"):
        if report[f"{problem}_keys"]:
            first = min(map(str, report[f"{problem}_keys"]))
            raise ValueError(f"{file}: {problem} tensors, such as {first}; expected the published layout")
    return model


def five_layers(state: dict[str, Tensor], file: Path) -> nn.Sequential:
    """The head of ImageReward and of the aesthetic predictor: five linear layers, with nothing between them.

    The dropouts that lie between them in training keep their places in the names: layers.0, 2, 4, 6 and 7.

    Raises:
        ValueError: for other layers, naming the file.
    """
    names = [f"layers.{place}.{kind}" for place in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    if state.keys() != set(names):
        raise ValueError(
            f"{file}: the head has {', '.join(sorted(state)) or 'no tensors'}; expected {', '.join(names)}"
        )
    layers, width = [], state[names[0]].shape[-1]
    for weight, bias in zip(names[::2], names[1::2], strict=True):
        rows, columns = state[weight].shape
        if columns != width or state[bias].shape != (rows,):
            raise ValueError(
                f"{file}: {weight} is {(rows, columns)}; expected {width} columns and as many biases as rows"
            )
        layer = nn.Linear(columns, rows)
        layer.load_state_dict({"weight": state[weight], "bias": state[bias]})
        layers.append(layer)
        width = rows
    return nn.Sequential(*layers).requires_grad_(False).eval()
