"""Adapters combined with each other, folded into bases on disk, and found again in what was tuned."""

from gossamer.merging.combining import combine
from gossamer.merging.extract import as_lora, extract
from gossamer.merging.into_base import merge_into_base
from gossamer.merging.learned import learned_weights

__all__ = ["as_lora", "combine", "extract", "learned_weights", "merge_into_base"]
