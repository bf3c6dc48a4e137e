"""Several adapters as one, in every way that has a name."""

from gossamer.merging.combining import sparse, subspaces, sums
from gossamer.merging.combining.combine import combine
from gossamer.merging.combining.module import WAYS

__all__ = ["WAYS", "combine", "sparse", "subspaces", "sums"]
