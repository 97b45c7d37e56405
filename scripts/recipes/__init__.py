"""Whole ways: the demo, and building a set from a configuration."""
