"""Running a model with its adapters: one after another, or another one in every row."""

from gossamer.serving.engine import Engine
from gossamer.serving.generate import generate
from gossamer.serving.request import Reply, Request, Sampling
from gossamer.serving.scheduler import Limits

__all__ = ["Engine", "Limits", "Reply", "Request", "Sampling", "generate"]
