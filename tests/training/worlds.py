"""Several processes for a test, and a small loop that does what the training loop does, in a world.

Workers are forked from one clean process that has imported everything, so that a world of four starts in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch

import gossamer as gs
from gossamer.attachment import trainable_parameters
from gossamer.data.batches import collate
from gossamer.data.masks import Example
from gossamer.models import tiny, tiny_tokenizer
from gossamer.training.evaluate import pad_id
from gossamer.training.loss import supervised_nll
from gossamer.training.optim import make_optimizer
from gossamer.training.runs.checkpoint import Checkpoint
from gossamer.training.spread.exchange import Exchange
from gossamer.training.spread.world import World

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["tests.training.worlds", "torch.distributed.fsdp", "transformers.models.llama"])
PATIENCE = timedelta(seconds=40)


class Failed(NamedTuple):
    """What a process raised."""

    kind: str
    text: str


def in_world(size: int, function: Callable[..., Any], *arguments: Any, machines: int = 1) -> list[Any]:
    """What `function(world, *arguments)` returns in each process of a world, or the `Failed` that it raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [START.Pipe(duplex=False) for _ in range(size)]
    processes = [
        START.Process(target=_work, args=(send, rank, size, machines, port, function, arguments), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    for process, (_, send) in zip(processes, pipes, strict=True):
        process.start()
        send.close()
    results = [_received(receive) for receive, _ in pipes]
    for process in processes:
        process.join(20)
    return results


def _received(receive: Any) -> Any:
    assert receive.poll(90), "a process of this world hangs"
    try:
        return pickle.loads(receive.recv_bytes())
    except EOFError:
        return Failed("EOFError", "the process ended without a result")


def _work(send: Any, rank: int, size: int, machines: int, port: int, function: Any, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    local = size // machines
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = None
    try:
        world = World.here("cpu", patience=PATIENCE)
        result = function(world, *arguments)
        world.close()
    except Exception as error:
        result = Failed(type(error).__name__, str(error))
    send.send_bytes(pickle.dumps(result))  # as `send` would share tensors' memory, which goes with the process


def toy(architecture: str = "llama", dtype: torch.dtype = torch.float32, method: Any = None) -> Any:
    model = tiny(architecture, dtype=dtype)
    gs.attach(model, method or gs.LoRA(r=2, target_modules="all-linear"), seed=3)
    for index, parameter in enumerate(trainable_parameters(model, "default").values()):  # away from B = 0
        draw = torch.Generator().manual_seed(index)
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def rows(count: int = 24) -> list[Example]:
    draw = random.Random(7)
    made = []
    for index in range(count):
        length = draw.randint(4, 24)
        supervised = [place >= length // 2 for place in range(length)]
        made.append(Example([draw.randrange(256) for _ in range(length)], supervised, f"row {index}"))
    return made


STEPS = [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8, 9]], [[10]], [[11, 12], [13, 14, 15]]]
"""Batches of four steps; one of them has less rows than a world has processes."""


class Learned(NamedTuple):
    """Losses and gradients of every step, and the parameters after the last."""

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]
    parameters: dict[str, torch.Tensor]


def learn(
    world: World, model: Any, steps: Any = STEPS, *, after: Any = None, checkpoint: Checkpoint | None = None
) -> Learned:
    """The training loop in small: shares, backward, exchange, AdamW; `after(step, parameters, optimizer)` each step."""
    examples, pad = rows(), pad_id(tiny_tokenizer())
    lengths = [len(one) for one in examples]
    parameters = trainable_parameters(model, "default")
    optimizer = make_optimizer(parameters, 0.01)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    first = 0
    if checkpoint:
        checkpoint.restore(parameters, optimizer, world.device)
        first = checkpoint.state["step"]
    losses, gradients = [], []
    model.train()
    for number, batches in list(enumerate(steps))[first:]:
        world.reseed(0, number)
        supervised = sum(sum(examples[index].supervised[1:]) for batch in batches for index in batch)
        with Exchange(world, parameters.values(), batches, lengths) as step:
            for micro_batch in step.mine:
                batch = collate([examples[index] for index in micro_batch.indices], pad, world.device)
                loss = micro_batch.weight * (supervised_nll(model, batch).sum() / supervised)
                loss.backward()
                step.add(loss)
        losses.append(float(sum(loss for _, loss in step.parts)))
        gradients.append({name: one.grad.clone() for name, one in parameters.items() if one.grad is not None})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if after:
            after(number, parameters, optimizer)
    return Learned(losses, gradients, {name: one.detach().clone() for name, one in parameters.items()})
