"""The law: Gaussians, noise paths, variance schedules and the transition. Imports nothing else of stepfuse."""
