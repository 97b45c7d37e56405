"""What a command says when its memory does not suffice. The main program imports this only then."""

from argparse import Namespace

from stepfuse.data.out_of_memory import first_sentence, is_out_of_memory

# By option: what of it reduces memory. Those that cost least come first.
REMEDIES = {
    "decode_batch_size": "--decode_batch_size 1",
    "rows_at_once": "--rows_at_once, smaller",
    "batch_size": "--batch_size, smaller",
    "config": "a smaller batch_size in --config",
    "dtype": "--dtype bfloat16",
    "reward_dtype": "--reward_dtype bfloat16",
    "height": "--height and --width, smaller",
}


def out_of_memory_message(error: BaseException, parsed: Namespace) -> str | None:
    """One line for the failed allocation of a command, with the options of that command that help; None for others."""
    if not is_out_of_memory(error):
        return None
    given = {name: value for name, value in vars(parsed).items() if name in REMEDIES}
    remedies = []
    for name, text in REMEDIES.items():
        if name in given and given[name] not in (1, "bfloat16", "float16"):
            shown = given[name] if name not in ("config", "height") else None
            remedies.append(text if shown is None else f"{text} (now {shown})")
    return f"out of memory ({first_sentence(error)}); these reduce it: {'; '.join([*remedies, 'a larger GPU'])}"
