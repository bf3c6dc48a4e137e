"""One step's work dealt out to the processes of a run, and the sum of what came of it.

Adapters are small and the base is frozen, so a step needs one exchange: one all-reduce of one flat float32 buffer with
every gradient in it, after the last micro-batch. That is the sum of DistributedDataParallel without its hooks and
buckets, which hide the exchange of billions of gradients behind the backward; here there is little to hide. The same
buffer carries the losses, so every process knows the whole step, takes the same decision and fails the same way.

Source: Li et al. 2020, arXiv:2006.15704, section 3 (data parallel training, and what its buckets are for).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from gossamer.errors import GossamerError, ResourceError
from gossamer.training.spread.world import World


class MicroBatch(NamedTuple):
    """Rows that go through the model at once in one process.

    Attributes:
        indices: of the examples.
        weight: 0 for rows that another process learns from. They only keep this one in step.
    """

    indices: list[int]
    weight: float = 1.0


class Exchange:
    """The micro-batches of one step that this process learns from, and the sum of all processes' results.

        step = Exchange(world, parameters, batches, lengths)
        with step:
            for micro_batch in step.mine:
                loss = micro_batch.weight * (sum of losses over these rows / terms of the whole step)
                loss.backward()
                step.add(loss)
        step.parts, parameters' .grad                    now the whole step's, the same in every process

    A process that is alone makes the same calls: `mine` are its batches as they are, and nothing is exchanged. Where
    the work of several steps is mixed, `close` does what leaving the block does.

    An error in one process while the block is open is raised in all of them when it closes, so none waits for ever.
    Where the base is sharded the others are inside the model's own exchange then, and torchrun ends them.

    Attributes:
        mine: what goes through the model here, one after the other. May be empty.
        parts: (indices of examples, loss) of all that went through the model, in the order of the ranks.
    """

    def __init__(
        self,
        world: World,
        parameters: Iterable[nn.Parameter],
        batches: Sequence[list[int]],
        lengths: Sequence[int],
    ) -> None:
        self.world, self.parameters = world, [*parameters]
        self.dealt = shares(batches, lengths, world.size, even=world.sharded)
        self.mine = self.dealt[world.rank]
        self.losses: list[Tensor] = []
        self.parts: list[tuple[list[int], Tensor]] = []

    @property
    def complete(self) -> bool:
        """Whether all of `mine` have been noted."""
        return len(self.losses) == len(self.mine)

    def add(self, loss: Tensor) -> None:
        """Note the loss of the next of `mine`, whose backward has run."""
        self.losses.append(loss.detach())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Sum up what came of the step in every process. Raises, in all the others, the error of one."""
        if self.world.size == 1:
            self.parts = [(one.indices, loss) for one, loss in zip(self.mine, self.losses, strict=False)]
            return
        if error is not None and (self.world.sharded or not isinstance(error, Exception)):
            return
        if not self._all_reduced(error is not None):
            return
        if error is not None and not isinstance(error, GossamerError):
            first = str(error).partition("\n")[0]
            known = ResourceError(f"another process of this run failed: {type(error).__name__}: {first}")
        else:
            known = error
        others = [one for one in self.world.gathered(known) if one is not None]
        if error is None:
            raise others[0]

    def _all_reduced(self, failed: bool) -> bool:
        """Sum gradients and losses of all processes. True when one of them failed; then nothing is changed."""
        parameters, device = self.parameters, self.parameters[0].device
        counted = [(rank, one) for rank, share in enumerate(self.dealt) for one in share if one.weight]
        own, zero = iter(self.losses), torch.zeros((), device=device)
        losses = [next(own, zero) if rank == self.world.rank else zero for rank, _ in counted]
        reached = torch.tensor([float(failed), *(float(one.grad is not None) for one in parameters)], device=device)
        gradients = [(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in parameters]
        flat = self.world.summed(torch.cat([reached, torch.stack([*losses, zero]).to(device), *gradients]))
        reached, losses, *gradients = flat.split([len(reached), len(losses) + 1, *map(len, gradients)])
        failures, *counts = reached.tolist()
        if failures:
            return True
        for parameter, count, gradient in zip(parameters, counts, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if count else None
        self.parts = [(one.indices, loss) for (_, one), loss in zip(counted, losses, strict=False)]
        return False


def shares(
    batches: Sequence[list[int]], lengths: Sequence[int], size: int, *, even: bool = False
) -> list[list[MicroBatch]]:
    """Deal the rows of one step out to `size` processes; every row to exactly one, and the same plan in all of them.

    Longest rows first, each to the process with the fewest tokens so far; then each process' rows are cut into
    micro-batches that hold, padding counted, no more tokens than the largest of `batches` did.

    Args:
        batches: what one process alone would send through the model, one after the other; it keeps them as they are.
        lengths: tokens of every example.
        even: give all processes the same number of micro-batches, filled up with some of weight 0.
    """
    if size == 1:
        return [[MicroBatch(batch) for batch in batches]]
    most = max(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    rows = sorted((index for batch in batches for index in batch), key=lambda index: (-lengths[index], index))
    dealt: list[list[list[int]]] = [[] for _ in range(size)]
    loads = [0] * size
    for row in rows:
        lightest = loads.index(min(loads))
        loads[lightest] += lengths[row]
        cuts = dealt[lightest]
        if not cuts or (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] > most:
            cuts.append([])
        cuts[-1].append(row)
    longest = max(map(len, dealt)) if even else 0
    idle = MicroBatch(rows[-1:], weight=0.0)
    return [[*map(MicroBatch, cuts), *[idle] * (longest - len(cuts))] for cuts in dealt]
