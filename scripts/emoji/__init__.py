"""Builders of the embedded emoji bases; not in the wheel."""
