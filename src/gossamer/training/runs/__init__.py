"""A run from its config file: the base loaded, the adapter attached, the loop called; or a rehearsal of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.attachment import InjectionReport, attach
from gossamer.models import load_base
from gossamer.progress import Progress
from gossamer.training.config import RunConfig
from gossamer.training.spread.world import World
from gossamer.training import loop
from gossamer.data.masks import preview
from gossamer.training.dataset import EncodedDataset, Steps
from gossamer.training.memory import decide
from gossamer.training.optim import peak_lr
from gossamer.training.runs.outcome import Run
from gossamer.training.runs.outcome import refuse_output
from gossamer.training.spread.sharding import shard


def run(config: RunConfig, *, resume: bool = False, progress: Progress | None = None) -> Run:
    """Load the base that a config names, attach its method, and `train`. Raises what these three raise.

    What can be refused without the base, such as a folder in use or a file that is not there, is refused before it.
    """
    world = World.here(config.device)
    show = world.shown(progress)
    go_on = resume or (world.restarts > 0 and world.first(lambda: Path(config.output).exists()))
    world.first(lambda: str(refuse_output(config.output, resume=go_on)))
    files = config.data.read()
    model, tokenizer, report = _prepared(config, world)
    show.say(str(report))
    if world.size > 1 and config.train.shard != "none":
        show.say(str(shard(model, world, across=config.train.shard)))
    run = loop.train(model, tokenizer, config, resume=go_on, progress=show, world=world, files=files)
    world.close()
    return run


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do, found out without training or writing anything.

    Attributes:
        injection: the modules that would carry the adapter.
        data: one line each on the files and on what became of their rows.
        steps: optimiser steps; lr: the peak learning rate, and why.
        memory: whether activations would be checkpointed, and what a step is planned to take.
        preview: the first row as (text, supervised) pieces.
    """

    config: RunConfig
    injection: InjectionReport
    data: tuple[str, ...]
    steps: int
    lr: str
    memory: str
    preview: tuple[tuple[str, bool], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        preview = [{"text": text, "supervised": supervised} for text, supervised in self.preview]
        plain = {"config": self.config.to_dict(), "injection": self.injection.to_dict(), "data": [*self.data]}
        return vars(self) | plain | {"preview": preview}


def rehearse(config: RunConfig) -> Rehearsal:
    """Everything that `run` does before its first step, but for evaluating and writing. Raises what `run` raises."""
    files = config.data.read()
    model, tokenizer, report = _prepared(config, World())
    said: list[str] = []
    config.task.fits(model)
    dataset = EncodedDataset.read(config, tokenizer, said.append, files, model=model)
    lr = peak_lr(model.config, config)[1]
    pieces = preview(dataset.examples[0], tokenizer)
    steps = Steps(dataset.examples, config)
    memory = decide(model, config, steps.largest()).rule
    return Rehearsal(config, report, tuple(said), steps.total, lr, memory, tuple(pieces))


def _prepared(config: RunConfig, world: World) -> tuple[Any, Any, InjectionReport]:
    device = config.device if world.size == 1 else str(world.device)
    if world.size > 1 and config.train.shard != "none":
        device = "cpu"  # pages of the file, which all processes of a machine share, until they are sharded
    model, tokenizer = load_base(config.named_base(), dtype=config.dtype, device=device, quant=config.quant)
    return model, tokenizer, attach(model, config.method, seed=config.train.seed)
