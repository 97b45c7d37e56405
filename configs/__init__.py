"""Configurations that work as they are; each opens with the command that uses it."""

from pathlib import Path

FOLDER = Path(__file__).parent
