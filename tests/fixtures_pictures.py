"""Boxes in pictures, and a name that is hard to place."""

WORD = "an_objective_whose_name_is_longer_than_any_reasonable_column_is_wide"

Box = tuple[float, float, float, float]


def apart(first: Box, second: Box) -> bool:
    """Whether two boxes (left, top, right, bottom) have no pixel in common."""
    return first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
