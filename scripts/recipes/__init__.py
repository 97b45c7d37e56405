"""Recipes of several steps: the demo, and building a set from a configuration."""
