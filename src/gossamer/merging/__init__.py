"""Adapters folded into bases on disk."""

from gossamer.merging.into_base import merge_into_base

__all__ = ["merge_into_base"]
