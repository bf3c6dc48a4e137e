"""What a module is to an adapter. What its forward does decides, not its class's name or parents.

A module is "linear" if calling it is torch's own linear map: because its forward is `nn.Linear`'s very own, or, where
it is another one, because a small trial shows that a change of its weight changes the output as that map would.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gossamer.attachment.frozen import CONVOLVE, Frozen, parameters_of
from gossamer.attachment.walk import CONTAINER
from gossamer.methods import Shape
from gossamer.methods.base import AFFINE_KINDS
from gossamer.quant import QuantizedLinear

_EXACT: dict[str, tuple[Any, ...]] = {
    "linear": (nn.Linear.forward, QuantizedLinear.forward),
    "embedding": (nn.Embedding.forward,),
    "conv": tuple(kind.forward for kind in CONVOLVE),
}
_NAMED = {"linear": "nn.Linear", "conv1d": "Conv1D", "embedding": "nn.Embedding", "conv": "torch's convolution"}
_tried: WeakKeyDictionary[type, dict[Any, str]] = WeakKeyDictionary()
"""Class -> plain attributes of a module -> what a trial said of such modules."""


def kind_of(module: nn.Module) -> str:
    """What a module is to an adapter; see `Shape.kind`."""
    kind = looks_like(module)
    return "" if kind in AFFINE_KINDS and why_not(module, kind) else kind


def looks_like(module: nn.Module) -> str:
    """The kind that a module's class and parameters say; whether its forward agrees, `why_not` says."""
    if isinstance(module, QuantizedLinear):
        return "linear"
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return _kind_without_weight(module)
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, tuple(CONVOLVE)):
        return "conv"
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else ""


def _kind_without_weight(module: nn.Module) -> str:
    """A weight may be computed by a parametrisation or not made yet; then there is nothing to adapt."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    own = module._parameters
    if own and "expert" in type(module).__name__.lower() and any(p is not None and p.ndim == 3 for p in own.values()):
        return "experts"
    if _is_decoder(module) and "past_key_values" in inspect.signature(type(module).forward).parameters:
        return "model"
    return ""


def _is_decoder(module: nn.Module) -> bool:
    """A transformers model that may read left to right; whether it does, its signature tells."""
    config = getattr(module, "config", None) if hasattr(type(module), "base_model_prefix") else None
    return config is not None and not getattr(config, "is_encoder_decoder", False)


def shape_of(path: str, module: nn.Module, matrices: tuple[str, ...] | None = None, kind: str | None = None) -> Shape:
    """What a method may know of a module.

    Args:
        matrices: of experts or attention, the names of the matrices to adapt; None for all.
        kind: what to take it for, whatever its forward does; None for what it is.
    """
    kind = kind_of(module) if kind is None else kind
    own = parameters_of(module)
    outer = inner = 0
    kernel: tuple[int, ...] = ()
    if kind in AFFINE_KINDS:
        outer, inner, *rest = own["weight"].shape
        kernel = tuple(rest)
        if kind in ("conv1d", "embedding"):
            outer, inner = inner, outer
    groups = int(getattr(module, "groups", 1)) if kind == "conv" else 1
    transposed = kind == "experts" and bool(getattr(module, "is_transposed", False))
    return Shape(
        path,
        kind,
        type(module).__name__,
        outer,
        inner * groups,
        own,
        kernel,
        groups,
        {name: size for name, size in _matrices(kind, own, transposed).items() if matrices is None or name in matrices},
        transposed,
        config=getattr(module, "config", None) if kind == "model" else None,
        embeddings=module.get_input_embeddings().weight if kind == "model" else None,  # pyright: ignore[reportCallIssue]
    )


def _matrices(kind: str, own: Mapping[str, Tensor], transposed: bool) -> dict[str, tuple[int, int, int]]:
    if kind == "attention":
        return {name: (1, value.shape[0], value.shape[1]) for name, value in own.items() if value.ndim == 2}
    if kind == "experts":
        return {
            name: (value.shape[0], value.shape[2 if transposed else 1], value.shape[1 if transposed else 2])
            for name, value in own.items()
            if value.ndim == 3
        }
    return {}


# Whether the forward is what the class says --------------------------------------------------------------------------


def why_not(module: nn.Module, kind: str) -> str:
    """Why calling a module is not the map of its kind, in words; "" if it is.

    Cost: nothing for torch's own forwards; a trial once for each class with a forward of its own.
    """
    forward, override = type(module).forward, _override(module)
    if override is not None and not _goes_through(module, override):
        return _tried_out(module, kind)
    return "" if _is_own(type(module), forward, kind) else why_not_of_class(module, kind)


def why_not_of_class(module: nn.Module, kind: str) -> str:
    """The same, tried once for each class and the plain values that its modules hold."""
    plain = (int, float, str, bool, tuple, type(None))
    key = (kind, tuple((name, value) for name, value in vars(module).items() if isinstance(value, plain)))
    known = _tried.setdefault(type(module), {})
    try:
        if key not in known:
            known[key] = _tried_out(module, kind)
        return known[key]
    except TypeError:  # a tuple of something that cannot be looked up
        return _tried_out(module, kind)


def _is_own(cls: type, forward: Any, kind: str) -> bool:
    if kind == "conv1d":
        return (forward.__module__, forward.__qualname__) == ("transformers.pytorch_utils", "Conv1D.forward")
    if kind == "conv":  # which all call this part
        inner = next(one for one in CONVOLVE if issubclass(cls, one))
        if getattr(cls, "_conv_forward", None) is not inner._conv_forward:
            return False
    return forward in _EXACT[kind]


def _override(module: nn.Module) -> Callable[..., Any] | None:
    """Another tool's forward on this very module, seen through our own."""
    ours = module._modules.get(CONTAINER)
    return vars(module).get("forward") if ours is None else vars(ours).get("outer")


def _goes_through(module: nn.Module, override: Any) -> bool:
    """Whether an override holds the module's own forward: a profiler's, or Accelerate's moving of tensors."""
    held = [cell.cell_contents for cell in getattr(override, "__closure__", None) or ()]
    held += [vars(module).get("_old_forward"), override, getattr(override, "__wrapped__", None)]
    return any(getattr(one, "__self__", None) is module for one in held)


@torch.no_grad()
def _tried_out(module: nn.Module, kind: str) -> str:
    """Run a module with small weights, change them, and compare with what its kind's map makes of the change."""
    says = f"the forward of {type(module).__name__} is its own"
    if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
        return f"{says}, and its weights are not there to try it with"
    frozen, training = Frozen(shape_of("", module, kind=kind), module), module.training
    frozen.outer = _override(module)
    taken = len(inspect.signature(frozen.outer or type(module).forward).parameters) - (frozen.outer is None)
    if kind == "embedding" and taken > 1:
        return f"{says} and takes more than the ids, which is all that a layer could look up"
    vars(module)["training"] = False
    try:
        got, wanted = (_embedded if kind == "embedding" else _mapped)(frozen)
    except Exception as error:
        return f"{says} and does not take what {_NAMED[kind]} takes ({type(error).__name__})"
    finally:
        vars(module)["training"] = training
    if not isinstance(got, Tensor):
        return f"{says} and returns a {type(got).__name__}"
    exact = got.dtype in (torch.float32, torch.float64)
    if got.shape != wanted.shape or not torch.allclose(got.float(), wanted.float(), 0, 1e-4 if exact else 0.1):
        return f"{says}: a change of its weight does not change its output as {_NAMED[kind]}'s would"
    return ""


def _numbers(*size: int, seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(like.device, like.dtype)


def _of_rank_one(weight: Tensor, seed: int) -> Tensor:
    """A weight with entries of about 1 / sqrt(fan in), quickly drawn however large it is."""
    rest = (1,) * (weight.ndim - 1)
    rows = _numbers(len(weight), *rest, seed=seed, like=weight)
    columns = _numbers(1, *weight.shape[1:], seed=seed + 1, like=weight)
    return rows * columns / math.prod(weight.shape[1:]) ** 0.5


def _mapped(frozen: Frozen) -> tuple[Any, Tensor]:
    """What a change of weight and bias changes in the output, and what it should change."""
    module: Any = frozen.module
    own = {name: value for name, value in frozen.parameters().items() if name in ("weight", "bias")}
    first = {name: _of_rank_one(value, 1) if value.ndim > 1 else value for name, value in own.items()}
    change = {name: _of_rank_one(value, 3) for name, value in own.items()}
    steps = zip(frozen.shape.kernel, module.stride, module.dilation, strict=True) if frozen.shape.kernel else ()
    spans = [2 * stride + (size - 1) * rate + 1 for size, stride, rate in steps]
    size = (2, frozen.shape.in_features, *spans) if spans else (2, 3, frozen.shape.in_features)
    x = _numbers(*size, seed=5, like=own["weight"])
    before = frozen.with_parameters(first, x)
    if not isinstance(before, Tensor):
        return before, x
    after = frozen.with_parameters({name: first[name] + change[name] for name in own}, x)
    weight = change["weight"].T if frozen.shape.kind == "conv1d" else change["weight"]
    if frozen.shape.groups > 1:  # torch's own way through a convolution with groups, which `Frozen.mapped` leaves out
        wanted = next(one for one in CONVOLVE if isinstance(module, one))._conv_forward(module, x, weight, None)
    else:
        wanted = frozen.mapped(x, weight)
    if "bias" in own:
        wanted = wanted + change["bias"].reshape(-1, *(1 for _ in spans))
    return after - before, wanted


def _embedded(frozen: Frozen) -> tuple[Any, Tensor]:
    """The same of an embedding: rows that a pair of factors gives, looked up at once and by the first factor."""
    weight = frozen.parameters()["weight"]
    ids = torch.tensor([[0, len(weight) - 1, 0]], device=weight.device)
    inner, outer = _numbers(len(weight), 3, seed=1, like=weight), _numbers(weight.shape[1], 3, seed=2, like=weight)
    before = frozen.mapped(ids, _of_rank_one(weight, 3).T)
    if not isinstance(before, Tensor):
        return before, ids
    after = frozen.mapped(ids, (_of_rank_one(weight, 3) + inner @ outer.T).T)
    return after - before, frozen.mapped(ids, inner.T) @ outer.T
