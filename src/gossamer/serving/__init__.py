"""Running a model with its adapters: one after another, or another one in every row."""

from gossamer.moved import renamed
from gossamer.serving.engine import Engine
from gossamer.serving.generate import generate
from gossamer.serving.sampling import Sampling
from gossamer.serving.scheduler import Limits
from gossamer.serving.sequence import Reply, Sequence

__getattr__ = renamed(__name__)
__all__ = ["Engine", "Limits", "Reply", "Sampling", "Sequence", "generate"]
