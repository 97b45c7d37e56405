"""Evaluations: running, summarising and showing them."""
