"""The check of a release, for maintainers: the built package, used where no checkout is. Not part of the package."""
