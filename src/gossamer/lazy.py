"""Public names of a package that are imported when they are first used."""

import importlib
import sys
from collections.abc import Callable, Mapping


def homes(names: Mapping[str, str]) -> dict[str, str]:
    """Name -> module, in ascending order, of module -> names with spaces between them."""
    return dict(sorted((name, module) for module, each in names.items() for name in each.split()))


def lazy(package: str, home: Mapping[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__` (PEP 562): `home` says which module, without `gossamer.`, a name comes from."""

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"gossamer.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
