"""One run on several processes: each learns from a share of a step's rows, and all take the same step.

    g = sum over processes of  d (sum of nll over my rows / supervised tokens of the whole step) / d (A, B)

Adapters are small and the base is frozen, so a step needs one exchange: one all-reduce of one flat float32 buffer with
every gradient in it, after the last micro-batch. That is the sum of DistributedDataParallel without its hooks and
buckets, which hide the exchange of billions of gradients behind the backward; here there is little to hide. The same
buffer carries the losses, so every process knows the whole step, takes the same decision and fails the same way.

Processes are started by torchrun, which tells each of them its place in the environment. Whatever is written or read
once is done by the first one, and the others get its result or its error.

Source: Li et al. 2020, arXiv:2006.15704, section 3 (data parallel training, and what its buckets are for).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gossamer.errors import GossamerError, ResourceError, StateError, UsageError
from gossamer.progress import Progress, Silent, for_terminal
from gossamer.training.interrupt import StopRequest

PATIENCE = timedelta(minutes=30)
"""How long one process waits for the others; the first one may be writing or evaluating meanwhile."""

Value = TypeVar("Value")


class Piece(NamedTuple):
    """Rows that go through the model at once in one process.

    Attributes:
        indices: of the examples.
        counts: False for rows that another process learns from. They only keep this one in step, with weight zero.
    """

    indices: list[int]
    counts: bool = True


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

    def exchange(
        self, parameters: Iterable[nn.Parameter], batches: Sequence[list[int]], lengths: Sequence[int]
    ) -> Exchange:
        """One step's work and how its results come together; see `Exchange`."""
        return Exchange(self, [*parameters], shares(batches, lengths, self.size, even=self.sharded))

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


class Exchange:
    """The work of one step, dealt out, and the sum of what came of it.

        with world.exchange(parameters, batches, lengths) as step:
            for indices in step.mine:
                step.learn(sum of nll over these rows / supervised tokens of the whole step)
        step.parts, parameters' .grad                    now the whole step's, the same in every process

    An error in one process while the context is open is raised in all of them when it closes, so none waits for ever.
    Where the base is sharded the others are inside the model's own exchange then, and torchrun ends them.

    Attributes:
        parts: (indices of examples, loss) of all that went through the model, in the order of the ranks.
    """

    def __init__(self, world: World, parameters: list[nn.Parameter], dealt: list[list[Piece]]) -> None:
        self.world, self.parameters, self.dealt = world, parameters, dealt
        self.losses: list[Tensor] = []
        self.parts: list[tuple[list[int], Tensor]] = []

    @property
    def mine(self) -> list[list[int]]:
        """Rows that go through the model at once here, one after the other. May be none."""
        return [piece.indices for piece in self.dealt[self.world.rank]]

    def learn(self, loss: Tensor) -> None:
        """Run the backward of the next of `mine`."""
        counts = self.dealt[self.world.rank][len(self.losses)].counts
        (loss if counts else 0.0 * loss).backward()
        self.losses.append(loss.detach())

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.world.size == 1:
            self.parts = [(piece.indices, loss) for piece, loss in zip(self.dealt[0], self.losses, strict=False)]
        elif error is None or (isinstance(error, Exception) and not self.world.sharded):
            self._sum(error)

    def _sum(self, error: Exception | None) -> None:
        failed = self._all_reduced(error is not None)
        if not failed:
            return
        known = error if isinstance(error, GossamerError) else error and ResourceError(*_told(error))
        others = [one for one in self.world.gathered(known) if one is not None]
        if error is None:
            raise others[0]

    def _all_reduced(self, failed: bool) -> bool:
        """Sum gradients and losses of all processes. True when one of them failed; then nothing is changed."""
        parameters, device = self.parameters, self.parameters[0].device
        pieces = [(rank, piece) for rank, share in enumerate(self.dealt) for piece in share if piece.counts]
        own = iter(self.losses)
        zero = torch.zeros((), device=device)
        losses = [next(own, zero) if rank == self.world.rank else zero for rank, _ in pieces]
        reached = torch.tensor([float(failed), *(float(one.grad is not None) for one in parameters)], device=device)
        gradients = [(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in parameters]
        flat = torch.cat([reached, torch.stack([*losses, zero]).to(device), *gradients])
        with _talking():
            dist.all_reduce(flat)
        reached, losses, *gradients = flat.split([len(reached), len(losses) + 1, *map(len, gradients)])
        failures, *counts = reached.tolist()
        if failures:
            return True
        for parameter, count, gradient in zip(parameters, counts, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if count else None
        self.parts = [(piece.indices, loss) for (_, piece), loss in zip(pieces, losses, strict=False)]
        return False


def shares(batches: Sequence[list[int]], lengths: Sequence[int], size: int, *, even: bool = False) -> list[list[Piece]]:
    """Deal the rows of one step out to `size` processes; every row to exactly one, and the same plan in all of them.

    Longest rows first, each to the process with the fewest tokens so far; then each process' rows are cut into pieces
    that hold, padding counted, no more tokens than the largest of `batches` did.

    Args:
        batches: what one process alone would send through the model, one after the other; it keeps them as they are.
        lengths: tokens of every example.
        even: give all processes the same number of pieces, filled up with pieces that do not count.
    """
    if size == 1:
        return [[Piece(batch) for batch in batches]]
    most = max(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    rows = sorted((index for batch in batches for index in batch), key=lambda index: (-lengths[index], index))
    piles: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for row in rows:
        lightest = loads.index(min(loads))
        piles[lightest].append(row)
        loads[lightest] += lengths[row]
    dealt = [[Piece(piece) for piece in _cut(pile, lengths, most)] for pile in piles]
    longest = max(map(len, dealt)) if even else 0
    return [share + [Piece(rows[-1:], counts=False)] * (longest - len(share)) for share in dealt]


def _cut(rows: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows, longest first, as pieces of at most `most` tokens with padding."""
    pieces: list[list[int]] = []
    for row in rows:
        if not pieces or (len(pieces[-1]) + 1) * lengths[pieces[-1][0]] > most:
            pieces.append([])
        pieces[-1].append(row)
    return pieces


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


def _told(error: BaseException) -> tuple[str]:
    """One line on an error that torch or Python raised in another process."""
    return (f"another process of this run failed: {type(error).__name__}: {str(error).split(chr(10))[0]}",)


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
