"""A frozen base spread over the processes of a run: each keeps 1/n of every weight, and layers come together as needed.

    for each decoder layer:   all-gather its weights -> forward  -> let go of them
    in the backward:          all-gather its weights -> backward -> let go of them

That is FSDP2 with what training an adapter leaves of it: frozen weights have no gradients, so nothing is ever
reduce-scattered, and no optimiser state is there to shard. For the same reason machines need not share weights with
each other: the processes of one machine can hold the base between them, and only adapter gradients cross the network.
Adapter parameters stay whole in every process, so capturing and saving never meets a part of a tensor.

Source: Zhao et al. 2023, arXiv:2304.11277, sections 3.2 and 4.1 (sharding, and sharding within a group).
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from gossamer.attachment import attached
from gossamer.attachment.walk import CONTAINER, base_parameters
from gossamer.errors import StateError, UnsupportedError, UsageError
from gossamer.methods.virtual_tokens import PromptLayer
from gossamer.quant import QuantizedLinear
from gossamer.training.spread.world import World

Across = Literal["machine", "all"]


@dataclass(frozen=True)
class Sharding:
    """What became of a base.

    Attributes:
        processes: how many hold it between them.
        units: decoder layers that come together one at a time.
        own_bytes: of the base, in this process; whole_bytes: of the base; largest_bytes: of the largest unit.
    """

    processes: int
    units: int
    own_bytes: int
    whole_bytes: int
    largest_bytes: int

    def __str__(self) -> str:
        own, whole, largest = (
            f"{count / 2**30:,.2f} GiB" for count in (self.own_bytes, self.whole_bytes, self.largest_bytes)
        )
        return (
            f"sharding: {self.processes} processes hold {own} each of {whole}, in {self.units} layers that come "
            f"together one at a time (at most {largest})"
        )


def shard(model: Any, world: World, *, across: Across = "machine") -> Sharding:
    """Spread the frozen weights of a model over processes, in place. Afterwards `world.sharded` is true.

    Adapters are attached before: a base is recognised by its whole weights, and some starts are made of them. The
    weights may be on the CPU; they go to the process' device layer by layer, so that the device never holds more than
    its shards and one layer. Weights that were loaded from safetensors in their own dtype are pages of the file that
    all processes of a machine share, so neither does the machine's memory hold them more than once.

    Args:
        model: a transformers model with its adapters attached.
        world: of more than one process. All of them must make this call.
        across: "machine", so that each machine holds the base once and weights never cross the network; or "all", for
            a base that one machine's devices cannot hold.

    Raises: StateError when nothing is attached, or when it is sharded already. UsageError for one process. Unsupported-
    Error for a base in 4 or 8 bits (its codes are no parameters), for prompt tuning, and for a model that does not name
    its layers.
    """
    count = world.local_size if across == "machine" else world.size
    units = _units(model, world, count)
    ours = {parameter for name, parameter in model.named_parameters() if CONTAINER in name.split(".")}
    whole = sum(weight.nbytes for _, weight in base_parameters(model))
    largest = max(sum(weight.nbytes for weight in {*unit.parameters()} - ours) for unit in units)
    for parameter in ours:
        parameter.data = parameter.data.to(world.device)
    both = init_device_mesh(world.device.type, (world.size // count, count), mesh_dim_names=("machines", "holders"))
    for unit in units:
        _spread(unit, both["holders"], ours, reshard=True)
    # embeddings, last norm and head stay together from the forward to the end of the backward: the loss needs the head
    _spread(model, both["holders"], ours, reshard=False)
    world.sharded = True
    own = sum(weight.to_local().nbytes for _, weight in base_parameters(model) if isinstance(weight, DTensor))
    return Sharding(count, len(units), own, whole, largest)


def _spread(module: nn.Module, mesh: DeviceMesh, ours: set[nn.Parameter], *, reshard: bool) -> None:
    """Keep this process' part of what is still whole in a module."""
    weights = [one for one in module.parameters() if one not in ours and not isinstance(one, DTensor)]
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard, ignored_params=ours)
    for weight in weights:  # whoever still knows the whole weight keeps its shape, dtype and device, and no memory
        weight.data = weight.data.new_empty(()).expand(weight.shape)


def _units(model: Any, world: World, count: int) -> list[nn.Module]:
    """The decoder layers. Raises what `shard` raises."""
    if world.size == 1:
        raise UsageError("a base is sharded over several processes", got="one process", hint="start it with torchrun")
    if world.size % count:
        raise UsageError(
            "the machines do not have the same number of processes",
            got=f"{world.size} processes, {count} of them here",
            hint="across='all', or the same --nproc-per-node everywhere",
        )
    if not attached(model):
        raise StateError("no adapter is attached to this model", hint="attach first: a sharded base cannot be told")
    if is_sharded(model):
        raise StateError("this model is sharded already")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UnsupportedError(
            "a base in 4 or 8 bits cannot be sharded",
            hint="leave it whole in every process, or load it with quant=None",
        )
    if any(isinstance(module, PromptLayer) for module in model.modules()):
        raise UnsupportedError(
            "prompt tuning cannot be trained on a sharded base",
            got="it runs the layers on its own tokens first, and the backward comes back to them through the cache",
            hint="leave the base whole in every process, or use prefix tuning",
        )
    names = {*(getattr(model, "_no_split_modules", None) or ())}
    units = [module for module in model.modules() if type(module).__name__ in names]
    if not units:
        raise UnsupportedError("this model does not name its layers", where=type(model).__name__)
    return units


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are spread over processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
