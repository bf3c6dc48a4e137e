"""Adapters combined with each other, and folded into bases on disk."""

from gossamer.merging.combining import combine
from gossamer.merging.into_base import merge_into_base
from gossamer.merging.learned import learned_weights

__all__ = ["combine", "learned_weights", "merge_into_base"]
