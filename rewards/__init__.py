"""Rewards, one file each, and the protocol they implement. Higher scores are always better."""
