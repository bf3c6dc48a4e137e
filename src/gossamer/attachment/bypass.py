"""Which modules are used without being called: others' code reads their weight, so a layer beside calls is lost.

Mamba's kernels take `self.conv1d.weight`; a tied head is `linear(x, self.embed.weight)`.
"""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gossamer.attachment.reads import ANY, Guards, Path, reads
from gossamer.quant import QuantizedLinear

_CALL_THEIR_PARTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_OLD_NORMS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
"""Where hooks come from that compute a weight before the forward."""
_COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@dataclass
class Bypass:
    """How a module is used without being called.

    Attributes:
        readers: the modules whose code reads its weight or bias, by path.
        parameter: what they read, the first of it.
        only_training: whether all of it happens in training mode alone; else the module is called.
    """

    parameter: str
    readers: dict[str, nn.Module] = field(default_factory=dict)
    only_training: bool = True


def bypassed(modules: Mapping[str, nn.Module]) -> dict[str, Bypass]:
    """Path of each module whose parameters are used without calling it -> how.

    torch's attention and its encoder layer are not among the readers: the first is adapted as a whole, the second calls
    its parts as soon as one of them has a hook. Cost: a walk; the code of each class is looked at once.
    """
    paths = {module: path for path, module in modules.items()}
    found: dict[str, Bypass] = {}
    for path, module in modules.items():
        hooks = module._forward_pre_hooks
        if hooks and any(type(hook).__module__ in _OLD_NORMS for hook in hooks.values()):
            found.setdefault(path, Bypass("weight", only_training=False)).readers[path] = module
        if not module._modules or isinstance(module, _CALL_THEIR_PARTS):
            continue
        for way, parameter, guards in sorted(reads(type(module)), key=lambda one: (one[1] != "weight", one[0])):
            if not _may_hold(guards, module, training=True):
                continue
            for read in _at(module, way):
                held = isinstance(read, QuantizedLinear) or read._parameters.get(parameter, module) is not None
                if held and read is not module and read in paths:
                    one = found.setdefault(paths[read], Bypass(parameter))
                    one.readers[path] = module
                    one.only_training &= not _may_hold(guards, module, training=False)
    return found


_UNKNOWN: Any = object()


def _may_hold(guards: Guards, module: nn.Module, training: bool) -> bool:
    """Whether code under these conditions may run, as far as the module's plain attributes and its config tell."""
    for test, name, wanted in guards:
        value = _value(test, name, module, training)
        if value is not _UNKNOWN and bool(value) is not wanted:
            return False
    return True


def _value(node: ast.expr, name: str, module: Any, training: bool) -> Any:
    """A condition's value, read from attributes without running anything; _UNKNOWN where that does not tell it."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Attribute(value=ast.Name(id=own), attr="training") if own == name:
            return training
        case ast.Name(id=own) if own == name:
            return module
        case ast.Attribute(value=inner, attr=attribute):
            known = _value(inner, name, module, training)
            return getattr(known, "__dict__", {}).get(attribute, _UNKNOWN)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            known = _value(inner, name, module, training)
            return known if known is _UNKNOWN else not known
        case ast.BoolOp(op=op, values=parts):
            decisive = isinstance(op, ast.Or)
            known = [_value(part, name, module, training) for part in parts]
            if any(one is not _UNKNOWN and bool(one) is decisive for one in known):
                return decisive
            return _UNKNOWN if any(one is _UNKNOWN for one in known) else not decisive
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARED:
            sides = [_value(side, name, module, training) for side in (left, right)]
            plain = all(isinstance(side, int | float | str | None) for side in sides)
            try:
                return _COMPARED[type(op)](*sides) if plain else _UNKNOWN
            except TypeError:
                return _UNKNOWN
    return _UNKNOWN


def _at(module: Any, way: Path) -> Iterator[nn.Module]:
    """The modules that a path leads to."""
    if not way:
        yield module
        return
    children = module._modules
    name, rest = way[0], way[1:]
    for child in children.values() if name == ANY else (children.get(name),):
        if child is not None:
            yield from _at(child, rest)
