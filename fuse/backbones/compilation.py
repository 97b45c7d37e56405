"""What can be asked of torch.compile, checked before anything is loaded. Nothing here imports torch."""

HOW = ("regional", "full")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that record them
MODES = ("default", *CUDA_GRAPHS)
ALL_MODES = (*MODES, "max-autotune-no-cudagraphs")  # those of torch


def check_compilation(how: str, mode: str, device: str) -> None:
    """Check the words, and that there is a GPU for a mode that records CUDA graphs; a ValueError says what to use."""
    for name, value, known in (("compile", how, HOW), ("mode", mode, ALL_MODES)):
        if value not in known:
            raise ValueError(f"{name} {value!r}; expected {', '.join(known[:-1])} or {known[-1]}")
    if mode in CUDA_GRAPHS and not device.startswith("cuda"):
        raise ValueError(f"mode {mode!r} records CUDA graphs, and the device is {device}; use mode default, or a GPU")
