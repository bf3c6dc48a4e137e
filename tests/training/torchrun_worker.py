"""Started by torchrun: learns in a sharded world with a checkpoint after each step, of which one process dies once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from gossamer.attachment import capture
from gossamer.training.runs.checkpoint import newest_checkpoint, save_checkpoint
from gossamer.training.spread.sharding import shard
from gossamer.training.spread.world import World
from tests.training.worlds import learn, toy


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = World.here("cpu")
    model = toy()
    shard(model, world)

    def after(step: int, parameters, optimizer) -> None:
        state = {"step": step + 1, "identity": {}, "processes": world.size}
        world.first(lambda: save_checkpoint(folder, state, parameters, optimizer, world.device, keep=2) and None)
        if found is None and step == 1:
            world.gathered(None)
            if world.rank == 1:
                os._exit(9)  # as if the system had killed it

    found = world.first(lambda: newest_checkpoint(folder, print)) if world.restarts else None
    learned = learn(world, model, after=after, checkpoint=found)
    if world.leads:
        assert found
        assert all(value.numel() for value in capture(model).named_tensors().values())
        save_file(learned.parameters, folder / "end.safetensors")
        (folder / "resumed").write_text(f"from step {found.state['step']}")
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
