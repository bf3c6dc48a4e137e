"""A model of the real classes on fake tensors, which have a shape and a type and no numbers, and the bytes that live.

Layers of a stack that are all alike are followed once: a stack keeps its first, its second and its last layer, and the
second stands for all between.
"""

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gossamer.errors import UnsupportedError
from gossamer.quant import FORMATS, QuantizedLinear, quantizable
from gossamer.quant.formats import BLOCK, NESTED_BLOCK, Packed, QuantFormat, dynamic_table, table

_ASKED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.allclose.default)
"""Operations whose result depends on numbers, which a fake tensor does not have."""

_GROUPED = torch.ops.aten._grouped_mm.default
_ANY = (torch.ops.aten.any.default, torch.ops.aten.any.dim)


class LiveBytes(TorchDispatchMode):
    """While open, `now` is the bytes of all tensors known, and `peak` the most there has been.

    Storages are known by their identity and report their end, so views count once and nothing counts after its end.
    What a kernel allocates and frees inside one operation is not seen.

    Attributes:
        log: bytes that came (above 0) and went (below 0), in their order.
        answer: what a fake tensor says where the program asks for its numbers.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.answer = True
        self.log: list[int] = []
        self.born: dict[int, int] = {}
        for tensor in known:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage until it is freed; one of the meta device takes nothing."""
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.born and size:
            weakref.finalize(storage, self._freed, key, size)
            self.born[key] = len(self.log)
            self.log.append(size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self.born[key]
        self.log.append(-size)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKED and any(isinstance(one, FakeTensor) for one in args):
            said = self.answer and not hasattr(args[0], "gossamer_any")  # nothing is wrong with any of them
            return said if func is not _ASKED[0] or args[0].dtype == torch.bool else int(said)
        if func is _GROUPED and isinstance(args[0], FakeTensor):
            out = _grouped(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.add(value)
        if func in _ANY and isinstance(out, FakeTensor):
            out.gossamer_any = True  # pyright: ignore[reportAttributeAccessIssue] (a note for the question that follows)
        return out


def _grouped(one: Tensor, other: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The result of a product for each of several experts: torch's own for fake tensors takes bfloat16 alone."""
    if one.dim() == other.dim() == 2:
        assert offs is not None, "two matrices are cut at offsets"
        return one.new_empty(len(offs), one.shape[0], other.shape[1])
    return one.new_empty(*one.shape[:-1] if other.dim() == 3 else one.shape[1:2], other.shape[-1])


def described(config: Mapping[str, Any], name: str = "") -> Any:
    """The model of a config on the meta device: by the class that the config names, else by its `model_type`.

    Raises: UnsupportedError for what transformers has no class for, or whose config makes no model.
    """
    import transformers
    from transformers.initialization import no_init_weights

    kind = str(config.get("model_type", ""))
    try:
        built = transformers.CONFIG_MAPPING[kind].from_dict(dict(config))
        found = [getattr(transformers, str(one), None) for one in config.get("architectures") or ()]
        classes: list[Any] = [
            one for one in found if isinstance(one, type) and issubclass(one, transformers.PreTrainedModel)
        ]
        with torch.device("meta"), no_init_weights():
            model = classes[0](built) if classes else _automatic(built)
        model.tie_weights()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnsupportedError(
            "transformers makes no model of this config",
            where=name,
            got=f"{kind or 'no model_type'}: {reason}",
            hint="type the numbers in: layers, hidden, heads, vocabulary, intermediate",
        ) from None
    return model


def _automatic(config: Any) -> Any:
    import transformers

    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    raise ValueError("no class for it")


def stacks(model: nn.Module, path: str = "") -> dict[str, int]:
    """Path -> layers of the lists of layers whose inner ones are all alike; a list inside another one is not one."""
    found: dict[str, int] = {}
    child: Any
    for name, child in model.named_children():
        here = f"{path}.{name}" if path else name
        listed = isinstance(child, nn.ModuleList) and len(child) > 1 and "expert" not in name
        if listed and len({*map(_outline, [*child][1:-1])}) <= 1:
            found[here] = len(child)
        else:
            found |= stacks(child, here)
    return found


def _outline(layer: nn.Module) -> tuple[Any, ...]:
    kinds = tuple(type(module).__name__ for module in layer.modules())
    return (*kinds, *((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()))


def cut(model: nn.Module, found: Mapping[str, int]) -> dict[str, int]:
    """Keep three layers of each stack, in place. Returns the path of each layer left -> how many it stands for."""
    repeats = {}
    for path, count in found.items():
        held: Any = model.get_submodule(path)
        layers = [*held]
        if count > 3:
            model.set_submodule(path, nn.ModuleList([layers[0], layers[1], layers[-1]]))
        kept = min(count, 3)
        repeats |= {f"{path}.{place}": count - 2 if place == 1 and kept == 3 else 1 for place in range(kept)}
    return repeats


def repeat_of(path: str, repeats: Mapping[str, int]) -> int:
    """How many parameters or modules one at a path stands for."""
    owner = next((one for one in repeats if path.startswith(one + ".")), None)
    return 1 if owner is None else repeats[owner]


def tensors(model: nn.Module, without: Iterable[nn.Module] = ()) -> dict[int, Tensor]:
    """Every tensor that a model's modules hold, as parameters, buffers or attributes, by its identity.

    `without`: modules that are passed over, and what is in them.
    """
    inside = (module for _, module in model.named_modules(memo={*without}))
    held = (group for module in inside for group in (module._parameters, module._buffers, vars(module)))
    return {id(one): one for group in held for one in group.values() if isinstance(one, Tensor)}


def faked(model: nn.Module, dtype: torch.dtype, found: Iterable[str] = ()) -> nn.Module:
    """A copy whose tensors are fake and on the CPU, floating parameters of a type; inside a `FakeTensorMode`.

    `found`: paths of stacks, of which the layers that `cut` takes away are not copied.
    """
    going = [layer for path in found for layer in [*cast(Any, model.get_submodule(path))][2:-1]]
    memo: dict[int, Any] = {id(layer): nn.Identity() for layer in going}
    for key, one in tensors(model, going).items():
        parameter = isinstance(one, nn.Parameter)
        made = torch.empty(one.shape, dtype=dtype if parameter and one.is_floating_point() else one.dtype, device="cpu")
        memo[key] = nn.Parameter(made, one.requires_grad) if parameter else made
    return copy.deepcopy(model, memo)


def stored(model: nn.Module, repeats: Mapping[str, int]) -> dict[int, int]:
    """Identity of each parameter and code -> bytes of all that it stands for."""
    packed = [(name, one) for name, one in model.named_modules() if isinstance(one, QuantizedLinear)]
    codes = ((f"{name}.{key}", one) for name, module in packed for key, one in module.named_buffers())
    return {id(one): one.nbytes * repeat_of(name, repeats) for name, one in (*model.named_parameters(), *codes)}


def warm(device: str = "cpu") -> None:
    """Make the tables that quantisation keeps, so that none of them is made of fake tensors."""
    for name in ("nf4", "fp4"):
        table(name, torch.device(device))
    dynamic_table(torch.device(device))


def quantise(model: nn.Module, quant: str) -> None:
    """Put codes in the place of the weights that `load_base` would quantise."""
    from gossamer.models.quantizer import kept_dense

    kept = kept_dense(model)
    for path, module in [*model.named_modules()]:
        if path not in kept and quantizable(module):
            weight, turned = module._parameters["weight"], not isinstance(module, nn.Linear)
            assert weight is not None, "quantizable says so"
            shape = (weight.shape[1], weight.shape[0]) if turned else (weight.shape[0], weight.shape[1])
            bias = module._parameters.get("bias")
            made = QuantizedLinear(_codes(shape, FORMATS[quant]), weight.dtype, bias, turned)
            model.set_submodule(path, made.train(module.training))


def _codes(shape: tuple[int, int], form: QuantFormat) -> Packed:
    weights = shape[0] * shape[1]
    if form.table == "int8":
        return Packed("int8", shape, torch.empty(shape, dtype=torch.int8), torch.empty(shape[0]))
    blocks = -(-weights // BLOCK)
    codes = torch.empty(-(-weights // 2), 1, dtype=torch.uint8)
    if not form.double:
        return Packed(form.table, shape, codes, torch.empty(blocks))
    nested = torch.empty(-(-blocks // NESTED_BLOCK))
    return Packed(form.table, shape, codes, torch.empty(blocks, dtype=torch.uint8), nested, torch.empty(()))
