"""Training: from a data file to an adapter.

containers -> formats -> masks -> batches turn a file into batches whose loss masks are proven;
loop repeats the one step for one state or many, checkpoint makes it resumable, evaluate measures it, report draws it.
"""

from gossamer.files.places import adapter_of
from gossamer.training.config import DataFiles, LoopConfig, RunConfig, TrainConfig
from gossamer.training.evaluate import answer_batches, answer_loss, evaluate
from gossamer.training.loop import train
from gossamer.training.many.many import Job, Runs, train_many
from gossamer.training.runs.outcome import Run

__all__ = [
    "DataFiles",
    "Job",
    "LoopConfig",
    "Run",
    "RunConfig",
    "Runs",
    "TrainConfig",
    "adapter_of",
    "answer_batches",
    "answer_loss",
    "evaluate",
    "train",
    "train_many",
]
