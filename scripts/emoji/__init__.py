"""Builders of the bundled emoji bases; not in the wheel."""
