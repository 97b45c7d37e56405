"""A world in which every density is known, to measure rules against."""
