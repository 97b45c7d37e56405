"""Registries of objects by name, which are imported when they are first used."""

from collections import UserDict
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TypeVar, cast

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """Objects by name, each the object or its location, `module:NAME`, which is imported when the object is used.

    So names can be listed without importing the modules, which may take seconds.
    """

    def __init__(self, values: Mapping[str, T | str]) -> None:
        super().__init__(cast(Mapping[str, T], values))

    def __getitem__(self, name: str) -> T:
        value = self.data[name]
        if isinstance(value, str):
            value = self.data[name] = resolve_name(value)
        return value
