"""How transformers' own loader quantises for us: each weight as it leaves its shard, so no dense model ever exists."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gossamer.attachment.fitness import heads
from gossamer.attachment.walk import modules
from gossamer.errors import GossamerError
from gossamer.quant import QuantizedLinear, quantizable, quantized
from gossamer.quant.layout import deserialized

METHOD = "gossamer"
"""What transformers knows this loader by."""


def kept_dense(model: nn.Module) -> set[str]:
    """Paths of modules that keep their weights: the head, and whatever shares a weight with another module."""
    found = modules(model)
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name.removesuffix(".weight") for name in (*pairs.keys(), *pairs.values())}
    return (tied & found.keys()) | heads(model, found)


class LoadingConfig(QuantizationConfigMixin):
    """What the loader is to do: quantise as `quant` says, or read modules that are stored so (`quant` None)."""

    def __init__(self, quant: str | None = None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.quant = quant


class Quantizer(HfQuantizer):
    """Puts a `QuantizedLinear` in the place of each linear module when its weight arrives."""

    # transformers gives each quantizer the config that is registered with it
    quantization_config: LoadingConfig
    serialized_names = {
        "weight": [
            *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
            *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4", "SCB", "weight_format"),
        ]
    }

    def __init__(self, quantization_config: LoadingConfig, **others: Any) -> None:
        super().__init__(quantization_config, **others)
        self.dense: set[str] | None = None

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **others: Any) -> bool:
        """Whether the weight of that name is one that codes will stand for."""
        path, _, name = param_name.rpartition(".")
        if name != "weight" or self.quantization_config.quant is None:
            return False
        if self.dense is None:
            self.dense = kept_dense(model)
        return path not in self.dense and quantizable(model.get_submodule(path))

    def get_quantize_ops(self) -> ConversionOps:
        """What turns a weight that has just been read into codes."""
        assert self.quantization_config.quant is not None
        return _Quantize(self, self.quantization_config.quant)

    def get_load_operations(self) -> dict[str, Any]:
        """What puts the stored parts of a weight together."""
        return {"deserialize": _Read}

    # both are declared without a type, and read as None by a checker
    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  # as above
        """Whether gradients go through the model."""
        return True


_faults: ContextVar[list[GossamerError]] = ContextVar("faults")


@contextmanager
def faults_as_found() -> Iterator[None]:
    """Run transformers' loader so that what is wrong with a quantised weight is raised as it was found.

    The loader itself turns every exception into a line of its report.
    """
    found: list[GossamerError] = []
    token = _faults.set(found)
    try:
        yield
    except Exception as error:
        raise (found[0] if found else error) from None
    finally:
        _faults.reset(token)


@contextmanager
def _noting() -> Iterator[None]:
    try:
        yield
    except GossamerError as error:
        _faults.get([]).append(error)
        raise


def forget_reading(model: Any) -> None:
    """Let the model be saved again: the loader would apply the inverse of what it read with, and there is none."""
    used = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        one for one in used if not any(isinstance(step, _Read) for step in getattr(one, "operations", None) or ())
    ]


class _Quantize(ConversionOps):
    """A weight that has just been read -> a module in the model; nothing is left for the loader to set."""

    def __init__(self, hf_quantizer: Quantizer, quant: str) -> None:
        self.hf_quantizer, self.quant = hf_quantizer, quant

    # transformers declares four positional arguments and calls every operation with keywords
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        """Put quantised modules into the model; what is left is for the loader to set."""
        left = {}
        for name, weight in _tensors(input_dict).items():
            path = name.rpartition(".")[0]
            module = model.get_submodule(path)
            if weight.shape != module.weight.shape:  # left for the loader to report: this one stays dense
                self.hf_quantizer.dense = {*(self.hf_quantizer.dense or ()), path}
                left[name] = weight
                continue
            with _noting():
                replacement = quantized(module, self.quant, name, weight)
            _place(model, path, replacement, missing_keys, name)
        return left


class _Read(ConversionOps):
    """The stored parts of one module's weight -> a module in the model; a plain weight is passed on."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]  # as above
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Put a quantised module into the model; nothing is left for the loader to set."""
        parts = _tensors(input_dict)
        if len(parts) == 1:
            return input_dict
        path = full_layer_name.rpartition(".")[0]
        module = model.get_submodule(path)
        turned = not isinstance(module, nn.Linear)
        outer, inner = module.weight.T.shape if turned else module.weight.shape
        with _noting():
            packed = deserialized(parts, path, (outer, inner))
        found = QuantizedLinear(packed, module.weight.dtype, module._parameters.get("bias"), turned)
        _place(model, path, found.train(module.training), missing_keys, full_layer_name)
        return {}


def _tensors(read: dict[str, Any]) -> dict[str, Tensor]:
    """The one tensor that was read for each name."""
    return {name: value[0] if isinstance(value, list) else value for name, value in read.items()}


def _place(model: nn.Module, path: str, module: QuantizedLinear, missing: Any, name: str) -> None:
    vars(module)["_is_hf_initialized"] = True
    model.set_submodule(path, module)
    if missing is not None:
        missing.discard(name)


register_quantization_config(METHOD)(LoadingConfig)
register_quantizer(METHOD)(Quantizer)


@torch.no_grad()
def make_dense(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put plain modules in the place of quantised ones: all of them in `dtype`, or (None) those folded for good."""
    for path, module in modules(model).items():
        if isinstance(module, QuantizedLinear) and (dtype is not None or not module.is_packed):
            weight = module.weight.to(dtype or module.dtype)
            outer, inner = weight.shape
            with torch.device("meta"):
                plain: Any = Conv1D(outer, inner) if module.turned else nn.Linear(inner, outer)
            plain.weight = nn.Parameter(weight.T.contiguous() if module.turned else weight, requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(path, plain.train(module.training))


def packed_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Path -> module of every weight that has codes."""
    return {path: one for path, one in modules(model).items() if isinstance(one, QuantizedLinear) and one.is_packed}


def stored_config(model: nn.Module) -> dict[str, Any] | None:
    """The `quantization_config` under which transformers' bitsandbytes reads the model; None when nothing is packed.

    Linear modules that are dense beside packed ones are named as those to skip.
    """
    packed = packed_modules(model)
    if not packed:
        return None
    first = next(iter(packed.values()))
    dense = [path for path, one in modules(model).items() if quantizable(one)]
    settings: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": dense or None}
    if first.table == "int8":
        return settings | {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 0.0}
    return (
        settings
        | {"load_in_8bit": False, "load_in_4bit": True}
        | {
            "bnb_4bit_quant_type": first.table,
            "bnb_4bit_use_double_quant": first.nested_absmax is not None,
            "bnb_4bit_compute_dtype": str(first.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    )
