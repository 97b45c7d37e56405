"""Rewards in a process, and if need be an environment, of their own."""
