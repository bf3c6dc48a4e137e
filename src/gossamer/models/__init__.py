"""Where base models come from: folders, the hub's cache, GGUF files, a small catalog, and seeded toys.

Importing this package loads nothing heavy; torch and transformers come with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOME = {
    "CATALOG": "catalog",
    "data_file": "catalog",
    "fetch": "catalog",
    "home": "catalog",
    "has_bfloat16_units": "load",
    "load_base": "load",
    "make_dense": "quantizer",
    "quantize_base": "quantize",
    "tiny": "toys",
    "tiny_inputs": "toys",
    "tiny_tokenizer": "toys",
    "write_model_folder": "write",
}
__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from gossamer.models.catalog import CATALOG as CATALOG
    from gossamer.models.catalog import data_file as data_file
    from gossamer.models.catalog import fetch as fetch
    from gossamer.models.catalog import home as home
    from gossamer.models.load import has_bfloat16_units as has_bfloat16_units
    from gossamer.models.load import load_base as load_base
    from gossamer.models.quantize import quantize_base as quantize_base
    from gossamer.models.quantizer import make_dense as make_dense
    from gossamer.models.toys import tiny as tiny
    from gossamer.models.toys import tiny_inputs as tiny_inputs
    from gossamer.models.toys import tiny_tokenizer as tiny_tokenizer
    from gossamer.models.write import write_model_folder as write_model_folder


def __getattr__(name: str) -> object:
    """Import a public name from its file, the first time it is used."""
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gossamer.models.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
