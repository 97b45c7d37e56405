"""Configuration files. Each begins with the command that uses it."""

from pathlib import Path

FOLDER = Path(__file__).parent
