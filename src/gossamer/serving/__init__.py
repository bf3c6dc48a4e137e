"""Running a model with its adapters."""

from gossamer.serving.generate import generate

__all__ = ["generate"]
