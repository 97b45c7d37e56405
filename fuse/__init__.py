"""Fusion of aligned denoising policies: Gaussians, noise paths, variance schedules, rules and the sampler."""
