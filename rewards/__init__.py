"""Rewards: one file each, and the protocol they follow. Higher is always better."""
