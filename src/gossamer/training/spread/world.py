"""One run on one process or on several: each learns from a share of a step's rows, and all take the same step.

    g = sum over processes of  d (sum of losses over my rows / terms of the whole step) / d (A, B)

Processes are started by torchrun, which tells each of them its place in the environment. Whatever is written or read
once is done by the first one, and the others get its result or its error. A process that is alone makes the same calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gossamer.errors import GossamerError, ResourceError, StateError, UsageError
from gossamer.progress import Progress, Silent, for_terminal
from gossamer.training.stopping import StopRequest

PATIENCE = timedelta(minutes=30)
"""How long one process waits for the others; the first one may be writing or evaluating meanwhile."""

Value = TypeVar("Value")


@dataclass
class World:
    """The processes of a run, as one of them sees them; by default it is alone, and nothing is ever exchanged.

    Attributes:
        rank: this process among `size`; the one with rank 0 leads.
        local_rank: this process among the `local_size` on its machine.
        device: where it computes.
        restarts: how often torchrun has started all of them anew.
        sharded: the base's weights are spread over the processes, so all must call the model equally often.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    restarts: int = 0
    sharded: bool = False

    @classmethod
    def here(cls, device: str = "auto", *, patience: timedelta = PATIENCE) -> World:
        """The world that torchrun tells of in the environment; one process alone where it tells of none.

        Joins the process group, unless that was done before: gloo for tensors on the CPU, nccl for those on CUDA, where
        each process takes the device of its local rank.

        Args:
            device: "auto" (CUDA if there is one for each process of this machine, else the CPU), "cpu" or "cuda".

        Raises: UsageError for an environment that is not torchrun's. ResourceError when the others cannot be reached,
        or a device is asked for that is not there.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"))
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        try:
            rank, size, local_rank, local_size, restarts = (
                int(os.environ[name] if name in names[:3] else os.environ.get(name, "0")) for name in names
            )
        except (KeyError, ValueError) as error:
            raise UsageError(
                "WORLD_SIZE is set, but the rest of torchrun's environment is not",
                got=str(error),
                hint="start the run with torchrun, or unset WORLD_SIZE",
            ) from None
        place = _device(device, local_rank, local_size)
        world = cls(rank, size, local_rank, local_size or size, place, restarts)
        if not dist.is_initialized():
            with _talking():
                store, *_ = next(rendezvous("env://", timeout=patience))
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
                    store=PrefixStore(_round(store, rank, size, patience), store),
                    rank=rank,
                    world_size=size,
                    timeout=patience,
                )
        return world

    def close(self) -> None:
        """Leave the process group, once all have come this far."""
        if self.size > 1 and dist.is_initialized():
            self.gathered(None)
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is the process that reads, writes and shows what is there once."""
        return self.rank == 0

    def shown(self, progress: Progress | None) -> Progress:
        """Who is told how far the run is: in the leading process the one given, or a bar or lines; elsewhere nobody."""
        return (progress or for_terminal()) if self.leads else Silent()

    # What all of them agree on ---------------------------------------------------------------------------------

    def first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns in the leading process, the only one that calls it. All wait for it.

        Raises, in every process, the `GossamerError` that it raises there.
        """
        if self.size == 1:
            return make()
        box: list[Any] = [None]
        if self.leads:
            try:
                box = [make()]
            except GossamerError as error:
                box = [error]
        with _talking():
            dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], GossamerError):
            raise box[0]
        return box[0]

    @contextmanager
    def opened(self, make: Callable[[], AbstractContextManager[Value]]) -> Iterator[Value]:
        """A context that only the leading process enters; all get what it gives. Raises as `first` does."""
        with ExitStack() as stack:
            yield self.first(lambda: stack.enter_context(make()))

    def gathered(self, value: Value) -> list[Value]:
        """What every process brings, in the order of their ranks."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        with _talking():
            dist.all_gather_object(box, value)
        return box

    def require_same(self, what: str, value: Mapping[str, Any]) -> None:
        """Raise `StateError` in every process unless all bring the same value, which is JSON."""
        own = {
            name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in value.items()
        }
        everywhere = self.gathered(own)
        odd = {
            name: rank for rank, one in enumerate(everywhere) for name in one if one[name] != everywhere[0].get(name)
        }
        if odd:
            raise StateError(
                f"the processes of this run do not have the same {what}",
                where=", ".join(f"{name} of process {rank}" for name, rank in odd.items()),
                expected="what process 0 has",
                hint="every machine needs the same files, the same config and the same versions",
            )

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the leading one's values, bit for bit."""
        if self.size > 1:
            with torch.no_grad(), _talking():
                for tensor in tensors:
                    held = tensor.detach().contiguous()
                    dist.broadcast(held, src=0)
                    tensor.copy_(held)

    def stop(self, request: StopRequest) -> str:
        """The signal that asked any process to stop; the same answer in all of them, and "" as long as there is none.

        All must ask at the same place. What one process was asked, all have then been asked.
        """
        if self.size == 1:
            return request.signal
        number = torch.tensor(signal.Signals[request.signal].value if request else 0)
        with _talking():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number and not request:
            request.signal = signal.Signals(int(number)).name
        return request.signal if number else ""

    # A step ----------------------------------------------------------------------------------------------------

    def summed(self, tensor: Tensor) -> Tensor:
        """The tensor with the sum of all processes' values in it, the same bits everywhere."""
        if self.size > 1:
            with _talking():
                dist.all_reduce(tensor)
        return tensor

    def reseed(self, seed: int, step: int) -> None:
        """Draw a step's random numbers from (seed, step, rank): others in every process, the same after a restart.

        A process that is alone goes on with its one sequence, which its checkpoints hold.
        """
        if self.size > 1:
            text = f"{seed}/{step}/{self.rank}".encode()
            torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1)

    def resumed(self, processes: int) -> str:
        """The line that says what a checkpoint of so many processes means for this world, if there is any to say."""
        if processes == self.size:
            return ""
        return (
            f"the checkpoint is of a run of {processes} processes, this one has {self.size}: the steps learn from the "
            "same rows, but sums are rounded and dropout is drawn otherwise"
        )


def _device(asked: str, local_rank: int, local_size: int) -> torch.device:
    count = torch.cuda.device_count() if asked != "cpu" else 0
    if asked == "cpu" or (asked == "auto" and count < max(local_size, local_rank + 1)):
        return torch.device("cpu")
    if local_rank >= count:
        raise ResourceError(
            "there is no CUDA device for this process",
            got=f"{count} devices, local rank {local_rank}",
            hint="torchrun --nproc-per-node: at most one process a device",
        )
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place


def _round(store: Store, rank: int, size: int, patience: timedelta) -> str:
    """A name for this start of the processes, known to all of them and to none that was there before.

    torchrun keeps its store over a restart, with the addresses of the processes that died in it; whoever believes one
    of those cannot connect. So each process asks under a word of its own, and the first one answers whoever asks.
    """
    own, deadline = secrets.token_hex(8), time.monotonic() + patience.total_seconds()
    if rank:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answer/{own}").decode()  # waits for it
        store.add(f"ready/{name}", 1)
        return name
    while store.add(f"ready/{own}", 0) < size - 1:
        if time.monotonic() > deadline:
            raise TimeoutError("not all processes of this run have come up")
        for word in [store.get(f"asks/{other}").decode() for other in range(1, size) if store.check([f"asks/{other}"])]:
            store.set(f"answer/{word}", own)
        time.sleep(0.02)
    return own


@contextmanager
def _talking() -> Iterator[None]:
    """Turn what torch says when another process is gone, or does not answer, into `ResourceError`."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        raise ResourceError(
            "the other processes of this run cannot be reached",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint="look at the first error in their logs; resume=True (--resume) goes on from the newest checkpoint",
        ) from error
