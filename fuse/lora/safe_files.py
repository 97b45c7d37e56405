"""The one format of weights that a set holds, and those that may run code when they are read."""

from pathlib import PurePath

from stepfuse.data.text_files import without_control_characters

WEIGHTS = "pytorch_lora_weights.safetensors"  # as `pipe.load_lora_weights` looks for it

# What torch, numpy and others unpickle, which may run any code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".p", ".npy", ".npz", ".joblib", ".dill", ".h5")


def check_no_pickle(file: PurePath) -> None:
    """Raise ValueError for a file that may be a pickle, by its name."""
    if file.suffix.lower() in PICKLES:
        raise ValueError(
            f"{without_control_characters(file)} is a pickle or may be one, which can run code when it is read; "
            "expected safetensors only: delete it, or convert it"
        )
