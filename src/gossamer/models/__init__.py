"""Where base models come from: folders, the hub's cache, GGUF files, a small catalog, and seeded toys.

Importing this package loads nothing heavy; torch and transformers come with the first name that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gossamer.lazy import homes, lazy

_HOME = homes(
    {
        "catalog.catalog": "CATALOG data_file home",
        "models.fetching": "fetch",
        "models.load": "has_bfloat16_units load_base",
        "models.quantize": "quantize_base",
        "models.quantizer": "make_dense",
        "models.write": "write_model_folder",
        "testing.toys": "tiny tiny_inputs tiny_tokenizer",
    }
)
__getattr__ = lazy(__name__, _HOME)
__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]  # one list, as in the package's own file

if TYPE_CHECKING:
    from gossamer.catalog.catalog import CATALOG as CATALOG
    from gossamer.catalog.catalog import data_file as data_file
    from gossamer.catalog.catalog import home as home
    from gossamer.models.fetching import fetch as fetch
    from gossamer.models.load import has_bfloat16_units as has_bfloat16_units
    from gossamer.models.load import load_base as load_base
    from gossamer.models.quantize import quantize_base as quantize_base
    from gossamer.models.quantizer import make_dense as make_dense
    from gossamer.models.write import write_model_folder as write_model_folder
    from gossamer.testing.toys import tiny as tiny
    from gossamer.testing.toys import tiny_inputs as tiny_inputs
    from gossamer.testing.toys import tiny_tokenizer as tiny_tokenizer


def __dir__() -> list[str]:
    return sorted(__all__)
