"""Loading a base model: a catalog entry, a folder, a GGUF file, or a model of the Hugging Face hub.

Every way ends at one folder (or GGUF file) on disk, whose JSON is read and judged before transformers sees it: no code
from the folder is ever run, only safetensors weights are read, and every weight of the model must be in the file and
every weight of the file in the model.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as noise

from gossamer.errors import BaseFileError, GossamerError, ResourceError, UsageError, nearest
from gossamer.models.locate import locate
from gossamer.models.quantizer import METHOD, LoadingConfig, faults_as_found, forget_reading, kept_dense, packed_modules
from gossamer.models.scrutiny import read_config, require_plain_weights, require_same, require_tokenizer
from gossamer.models.stored import warn_if_mostly_dense
from gossamer.models.write import forget_quantisation, without_bars
from gossamer.quant import format_of, quantize_model

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_base(
    base: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quant: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a base model, in eval mode, and its tokenizer.

    Args:
        base: the name of a fetched catalog entry, a folder, a `.gguf` file, or an id on the Hugging Face hub, in this
            order; an id is looked up in the hub's cache alone when HF_HUB_OFFLINE is set or the hub cannot be reached.
        dtype: "float32", "bfloat16", "float16" or "auto": the checkpoint's own, but float32 for a GGUF file (its
            weights are dequantised) and on a CPU without 16-bit matrix units, where bfloat16 is tens of times slower.
        device: "auto" (the first CUDA device, else the CPU) or any device torch knows.
        quant: None, or what linear weights are stored as: "nf4" (4.127 bits each), "nf4-single" (4.5), "fp4",
            "fp4-single" or "int8". Embeddings, the head, norms, biases and stacked experts keep their dtype (a warning
            says so where they are most of the layers), and `dtype` is what weights are rebuilt in. A folder that is
            stored quantised loads so without being asked. Memory while loading: what is quantised already and the
            tensor at hand (a GGUF file is loaded whole first).

    Returns model and tokenizer. The model's class is the one its config names, so a classifier loads as a classifier.

    Raises `BaseFileError` when it cannot be found, is not plain (remote code, pickled weights) or does not hold exactly
    the model's weights; `UsageError` for an unknown dtype, device or quant; `UnsupportedError` for bases that are
    stored quantised in other ways than bitsandbytes'; `ResourceError` when the device or its memory is not there.
    """
    if quant is not None:
        format_of(quant)
    place = _device(device)
    wanted = _dtype(dtype, place)
    path = locate(base)
    load = _load_gguf if path.suffix == ".gguf" else _load_folder
    with as_base_error(path), without_bars(), without_load_report():
        model, tokenizer, info = load(path, wanted, quant)
    require_exact(info, path)
    forget_quantisation(model)
    if quant is not None:
        warn_if_mostly_dense(model, quant)
    try:
        return model.to(place).eval(), tokenizer  # pyright: ignore[reportArgumentType]  # transformers' stub is narrower
    except torch.OutOfMemoryError as error:
        raise _too_large(str(place), error) from error


def _load_folder(
    folder: Path, dtype: torch.dtype | str, quant: str | None
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    config = read_config(folder)
    require_plain_weights(folder)
    require_tokenizer(folder)
    kind = model_class(config)
    # weights of another shape are let through here to be named by `require_exact`
    options: dict[str, Any] = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    stored = config.get("quantization_config")
    if stored is not None:
        require_same(stored, quant, folder)
        plain = AutoConfig.from_pretrained(folder, **LOCAL)
        plain.quantization_config = {"quant_method": METHOD}
        options["config"] = plain
    elif quant is not None:
        options["quantization_config"] = LoadingConfig(quant)
    with faults_as_found():
        model, info = kind.from_pretrained(folder, dtype=dtype, **options, **LOCAL)
    forget_reading(model)
    if stored is not None and not packed_modules(model):
        raise BaseFileError("the config says that weights are quantised, but none is", where=str(folder))
    return model, read_tokenizer(folder), info


def _load_gguf(file: Path, dtype: torch.dtype | str, quant: str | None) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    options: dict[str, Any] = {"gguf_file": file.name, "output_loading_info": True} | LOCAL
    options["dtype"] = torch.float32 if dtype == "auto" else dtype
    if hasattr(transformers, "GgufConfig"):
        # without it newer transformers may keep the blocks packed, in layers that cannot be trained, and fetch kernels
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    kind: Any = AutoModelForCausalLM  # its stub knows no loading info
    with _without_reader_bar():
        model, info = kind.from_pretrained(file.parent, **options)
    if quant is not None:
        quantize_model(model, quant, kept_dense(model))
    return model, read_tokenizer(file.parent, gguf_file=file.name), info


def read_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer of a folder, without a trace of how it was loaded."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **options, **LOCAL)
    for name in LOCAL:  # it keeps how it was loaded, and would save it with itself
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def model_class(config: dict[str, Any]) -> Any:
    """The transformers class that the config names, else the causal language model of its type."""
    for name in config.get("architectures") or ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    return AutoModelForCausalLM


def _dtype(dtype: str | torch.dtype, place: torch.device) -> torch.dtype | str:
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in _DTYPES:
        expected = ", ".join(["auto", *_DTYPES])
        raise UsageError("unknown dtype", got=name, expected=expected, hint=nearest(name, _DTYPES))
    if name == "auto" and place.type == "cpu" and not has_bfloat16_units():
        return torch.float32
    return _DTYPES.get(name, "auto")


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    found = torch.cpu.get_capabilities()
    return any(found.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError("unknown device", got=str(device), expected="auto, cpu, cuda, cuda:1, mps") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices"
        raise ResourceError("this device is not there", where=str(place), got=found, hint="device='cpu' always works")
    return place


def _too_large(where: str, error: Exception) -> ResourceError:
    hint = 'load it in bfloat16, with quant="nf4", or on the CPU; `gossamer plan` says what it takes'
    return ResourceError("the model does not fit into memory", where=where, got=str(error).split(". ")[0], hint=hint)


def require_exact(info: dict[str, Any], path: Path) -> None:
    """Every weight in the file, every weight of the file used: a head drawn at random is a silent bug."""
    faults = {
        "missing_keys": "weights of the model are not in the file",
        "unexpected_keys": "weights in the file are not in the model",
        "mismatched_keys": "weights in the file have another shape than in the model",
    }
    for kind, fault in faults.items():
        names = sorted(name if isinstance(name, str) else str(name[0]) for name in info.get(kind) or ())
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise BaseFileError(
                f"{len(names)} {fault}",
                where=str(path),
                got=", ".join(names[:8]) + more,
                hint="its config.json may name another architecture than the one the weights were saved from",
            )


@contextmanager
def as_base_error(path: Path) -> Iterator[None]:
    """A damaged folder shows as any exception there is (tokenizers raises bare `Exception`s); here they are one."""
    try:
        yield
    except GossamerError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(str(path), error) from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise BaseFileError("the base model cannot be loaded", where=str(path), got=reason) from error


@contextmanager
def without_load_report() -> Iterator[None]:
    """No table of missing weights on the terminal: what it warns of is an error here."""
    level = noise.get_verbosity()
    noise.set_verbosity(max(level, logging.ERROR))
    try:
        yield
    finally:
        noise.set_verbosity(level)


@contextmanager
def _without_reader_bar() -> Iterator[None]:
    """The GGUF reader draws its bar past transformers' own switch for bars."""
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = reader.tqdm
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar
