"""OpenAI's byte-pair merges, which reward packages carry, as the tokenizer.json that is published for transformers."""

import gzip
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

WORDS = 49152  # and two marks: 49,408 tokens are 256 bytes, each also at a word's end, these merges, and the marks


def write_tokenizer(merges: Path, folder: Path) -> None:
    """bpe_simple_vocab_16e6.txt.gz → tokenizer.json; OpenAI's simple_tokenizer.py says how words are numbered."""
    lines = gzip.decompress(merges.read_bytes()).decode().split("\n")[1 : WORDS - 256 - 2 + 1]
    pairs = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    folder.mkdir(parents=True, exist_ok=True)
    CLIPTokenizer(vocab=vocabulary, merges=pairs).save_pretrained(folder)
