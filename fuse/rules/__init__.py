"""Fusion rules: from the base and the adapters to the one Gaussian that a step samples."""
