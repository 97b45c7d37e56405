"""The multi-objective sampler."""
