"""Rewards in worker processes, optionally in a separate Python environment."""
