"""Where base models come from: folders, the hub's cache, GGUF files, a small catalog, and seeded toys.

Importing this package loads nothing heavy; torch and transformers come with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOME = {
    "data_file": "catalog.catalog",
    "fetch": "models.fetching",
    "has_bfloat16_units": "models.load",
    "load_base": "models.load",
    "make_dense": "models.quantizer",
    "quantize_base": "models.quantize",
    "tiny": "testing.toys",
    "tiny_inputs": "testing.toys",
    "tiny_tokenizer": "testing.toys",
    "write_model_folder": "models.write",
}
__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]  # one list, as in the package's own file

if TYPE_CHECKING:
    from gossamer.catalog.catalog import data_file as data_file
    from gossamer.models.fetching import fetch as fetch
    from gossamer.models.load import has_bfloat16_units as has_bfloat16_units
    from gossamer.models.load import load_base as load_base
    from gossamer.models.quantize import quantize_base as quantize_base
    from gossamer.models.quantizer import make_dense as make_dense
    from gossamer.models.write import write_model_folder as write_model_folder
    from gossamer.testing.toys import tiny as tiny
    from gossamer.testing.toys import tiny_inputs as tiny_inputs
    from gossamer.testing.toys import tiny_tokenizer as tiny_tokenizer


def __getattr__(name: str) -> object:
    """Import a public name from its file, the first time it is used."""
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gossamer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
