"""Training: from a data file to an adapter.

containers -> formats -> masks -> batches turn a file into batches whose loss masks are proven;
loop repeats the one step, checkpoint makes it resumable, evaluate measures it, report draws it.
"""

from gossamer.training.config import DataFiles, LoopConfig, RunConfig, TrainConfig
from gossamer.training.evaluate import evaluate
from gossamer.training.loop import Run, train
from gossamer.training.run_folder import adapter_of

__all__ = ["DataFiles", "LoopConfig", "Run", "RunConfig", "TrainConfig", "adapter_of", "evaluate", "train"]
