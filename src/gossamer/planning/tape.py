"""What autograd keeps and frees, on paper: the operations of a layer without their numbers.

A layer is written down once, as the operations that torch runs in it. Each operation says which tensors it keeps for
its backward and how large the gradients are that its backward makes; adding those up forwards gives the bytes that a
layer keeps, and going backwards through them gives the largest moment.

    kept by a layer  = sum over its operations of the storages they save, every storage once
    alive at node i  = storages saved by nodes 1..i  +  gradients that wait for their node  +  what node i makes

Rules, which are those of torch.autograd: an operation keeps something only if a gradient flows through it; a view
shares its storage; a node frees what it saved when it has run; two gradients of one tensor are added into a third.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Storage:
    """A piece of memory, in bytes. `resident` ones are counted elsewhere: weights, and what all layers share."""

    size: int
    resident: bool = False


@dataclass(eq=False, slots=True)
class Value:
    """A tensor: how many numbers, of how many bytes each, where they lie, and whether a gradient flows into it."""

    elements: int
    width: int
    storage: Storage
    grad: bool = False
    trained: bool = False

    @property
    def size(self) -> int:
        """Bytes of its own numbers; its storage may be larger."""
        return self.elements * self.width


@dataclass(eq=False, slots=True)
class Node:
    """The backward of one operation."""

    outputs: tuple[Value, ...]
    made: list[tuple[Value, int | None]]
    saved: list[Storage]
    scratch: int


@dataclass(frozen=True)
class Profile:
    """One piece of the model, in bytes.

    Attributes:
        saved: what it keeps from its forward for its backward.
        forward: the most that exists of it while it runs forwards.
        backward: the most that exists of it in its backward: saved storages, gradients, and what operations make.
        gradients: of trained parameters, which stay until the optimiser has used them.
    """

    saved: int
    forward: int
    backward: int
    gradients: int


class Tape:
    """Operations in the order they run in."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.kept: set[Storage] = set()
        self.saved = self.forward = 0

    def value(self, elements: int, width: int, *, grad: bool = False, resident: bool = False) -> Value:
        """A tensor that comes from outside."""
        return Value(elements, width, Storage(elements * width, resident), grad)

    def parameter(self, elements: int, width: int, trained: bool) -> Value:
        """A tensor that is in memory anyway."""
        return Value(elements, width, Storage(elements * width, True), trained, trained)

    def record(
        self,
        outputs: Value | Sequence[Value],
        made: Iterable[tuple[Value, int | None]],
        saves: Iterable[Value | None] = (),
        scratch: int = 0,
        forward: int = 0,
    ) -> None:
        """Add an operation.

        Args:
            outputs: what it gives.
            made: input -> bytes of the gradient that its backward makes for it; None hands its own gradient on.
            saves: tensors that its backward needs.
            scratch: further bytes while the backward runs, at its fullest moment.
            forward: further bytes while the forward runs.
        """
        outputs = (outputs,) if isinstance(outputs, Value) else tuple(outputs)
        made = [(value, size) for value, size in made if value.grad]
        saved = [value.storage for value in saves if value is not None and not value.storage.resident] if made else []
        for value in outputs:
            value.grad = bool(made)
        for storage in saved:
            if storage not in self.kept:
                self.kept.add(storage)
                self.saved += storage.size
        fresh = sum(value.size for value in outputs if value.storage not in self.kept and not value.storage.resident)
        self.forward = max(self.forward, self.saved + fresh + forward)
        if made:
            self.nodes.append(Node(outputs, made, saved, scratch))

    def profile(self, output: Value, seed: int | None = None) -> Profile:
        """Run the backward from a gradient of `output` (of its own size, or of `seed` bytes) and find its peak."""
        run = _Backward(self)
        run.start(output, output.size if seed is None else seed)
        for node in reversed(self.nodes):
            run.step(node)
        return Profile(self.saved, self.forward, run.peak, run.gradients)


class _Backward:
    """What is alive while the nodes run in reverse."""

    def __init__(self, tape: Tape) -> None:
        self.holders = Counter(storage for node in tape.nodes for storage in node.saved)
        self.alive = self.peak = sum(storage.size for storage in self.holders)
        self.waiting: dict[Value, Storage] = {}
        self.gradients = 0

    def start(self, output: Value, size: int) -> None:
        """The gradient that comes from above."""
        self.waiting[output] = self._new(size)

    def step(self, node: Node) -> None:
        """One node: make gradients, free what it saved, hand the gradients on."""
        arrived = [self.waiting.pop(value) for value in node.outputs if value in self.waiting]
        made: list[tuple[Value, Storage]] = []
        for value, size in node.made if arrived else ():
            if size is None:
                self.holders[arrived[0]] += 1
            made.append((value, arrived[0] if size is None else self._new(size)))
        self.peak = max(self.peak, self.alive + node.scratch)
        for storage in (*node.saved, *arrived):
            self._release(storage)
        for value, storage in made:
            self._deliver(value, storage)

    def _deliver(self, value: Value, new: Storage) -> None:
        if value.trained and value not in self.waiting:
            self.gradients += new.size
        old = self.waiting.get(value)
        if old is None:
            self.waiting[value] = new
        else:
            self.waiting[value] = self._new(new.size)
            self._release(old)
            self._release(new)

    def _new(self, size: int) -> Storage:
        storage = Storage(size)
        self.holders[storage] = 1
        self.alive += size
        self.peak = max(self.peak, self.alive)
        return storage

    def _release(self, storage: Storage) -> None:
        self.holders[storage] -= 1
        if not self.holders[storage]:
            self.alive -= storage.size
