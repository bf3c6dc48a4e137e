"""A plain model folder as a GGUF file for llama.cpp and Ollama, tensor by tensor; layout and names by the gguf package.

llama.cpp's own Llama rotates neighbouring numbers where transformers rotates halves, so rows of q and k change places:

    (heads, 2, half, ...) -> (heads, half, 2, ...)
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import BaseFileError, DiskError, StateError, UnsupportedError, UsageError
from gossamer.families import FAMILIES, GGUF_SPLITS
from gossamer.files.atomic import require_space, written_path
from gossamer.models.load import read_tokenizer
from gossamer.models.mapped import Mapped, mapped_model

WRITTEN = {name: one for name, one in FAMILIES.items() if one.gguf_model}
"""Model type -> family whose models are written."""
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_SAMPLES = 64


class GGUFTensor(NamedTuple):
    """One tensor of the file: its name there, the parameter it comes from, and what it is stored as."""

    name: str
    parameter: str
    dtype: torch.dtype


def write_gguf(folder: str | Path, output: str | Path, *, dtype: str = "auto") -> dict[str, Any]:
    """Write a transformers folder as one GGUF file, whole or not at all.

    Args:
        folder: a causal model of a type in `WRITTEN` with a byte-level BPE tokenizer.
        output: a file that does not exist yet.
        dtype: of the matrices: "f32", "f16", "bf16", or "auto" for what they are stored in; vectors are always f32.

    Returns: {"output", "architecture", "tokenizer", "tensors", "bytes", "dtype"}.

    Raises: UnsupportedError: another architecture, tokenizer or way of stretching positions. StateError: output exists.
        BaseFileError: not a whole model folder. DiskError: what was written is not what is read back, or no space.
    """
    import gguf

    folder, output = Path(folder), Path(output)
    if output.exists():
        raise StateError("the output exists already", where=str(output), hint="choose another name")
    if dtype not in ("auto", *TYPES):
        raise UsageError("unknown type", got=dtype, expected=", ".join(("auto", *TYPES)))
    base = mapped_model(folder)
    config: Any = base.model.config
    if config.model_type not in WRITTEN or not type(base.model).__name__.endswith("ForCausalLM"):
        raise UnsupportedError(
            "an architecture that is not covered", got=type(base.model).__name__, expected=", ".join(WRITTEN)
        )
    architecture = WRITTEN[config.model_type].gguf
    stored_as = TYPES.get(dtype, base.model.dtype)
    tensors = _tensors(base, architecture, stored_as)
    pre = _pre_tokenizer(folder)
    nbytes = sum(base.model.get_parameter(one.parameter).numel() * one.dtype.itemsize for one in tensors)
    require_space(output, nbytes)
    with written_path(output) as path:
        writer = gguf.GGUFWriter(path, architecture)
        _describe(writer, config, folder.name, stored_as)
        factors = _rope_factors(config)
        _add_tokens(writer, folder, pre, config.vocab_size)
        _write(writer, base, tensors, factors)
        _read_back(path, base, tensors)
    return {
        "output": str(output),
        "architecture": architecture,
        "tokenizer": pre,
        "tensors": len(tensors),
        "bytes": output.stat().st_size,
        "dtype": str(stored_as).removeprefix("torch."),
    }


def _tensors(base: Mapped, architecture: str, dtype: torch.dtype) -> list[GGUFTensor]:
    """Every stored parameter under its name in the file. Raises `UnsupportedError` for one that has none."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], base.model.config.num_hidden_layers)
    found, seen = [], set()
    for parameter, place in base.places.items():
        if place in seen:  # tied; llama.cpp takes the embedding where there is no output
            continue
        seen.add(place)
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedError("a parameter that llama.cpp's model has not", where=parameter, got=architecture)
        vector = base.stored(place).ndim == 1
        found.append(GGUFTensor(name, parameter, torch.float32 if vector else dtype))
    return found


def _describe(writer: Any, config: Any, name: str, dtype: torch.dtype) -> None:
    """The numbers of the model."""
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = {
        "name": name,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        **dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), head),
        "rope_freq_base": float(config.rope_parameters["rope_theta"]),
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    for key, value in numbers.items():
        getattr(writer, f"add_{key}")(value)
    window = getattr(config, "sliding_window", None)
    if WRITTEN[config.model_type].window and window:
        raise UnsupportedError("attention through a sliding window", got=str(window), hint="set it to null if unused")
    types = gguf.LlamaFileType
    writer.add_file_type({torch.float16: types.MOSTLY_F16, torch.bfloat16: types.MOSTLY_BF16}.get(dtype, types.ALL_F32))


def _rope_factors(config: Any) -> Tensor | None:
    """What each frequency is divided by; None where positions are not stretched. Raises `UnsupportedError`.

    Source: Llama 3.1's rope scaling, as in transformers' modeling_rope_utils.
    """
    stretched = config.rope_parameters
    kind = stretched.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedError(
            "a way of stretching positions that is not covered", got=kind, expected="default, llama3"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = 2 * math.pi * stretched["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    low, high = stretched["low_freq_factor"], stretched["high_freq_factor"]
    turns = stretched["original_max_position_embeddings"] / lengths
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / stretched["factor"] + share)


def _pre_tokenizer(folder: Path) -> str:
    """llama.cpp's name for how this tokenizer cuts text. Raises `UnsupportedError`, `BaseFileError`."""
    try:
        rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        kind, first = rules["model"]["type"], rules["pre_tokenizer"] or {}
        steps = first.get("pretokenizers", [first])
        kinds = [step.get("type") for step in steps]
        if kind == "BPE" and not rules.get("normalizer") and kinds[-1:] == ["ByteLevel"]:
            if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
                return "gpt-2"
            if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
                return "smollm"
            if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in GGUF_SPLITS:
                return GGUF_SPLITS[steps[0]["pattern"]["Regex"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseFileError("not a tokenizer", where=str(folder / "tokenizer.json"), got=str(error)) from None
    raise UnsupportedError(
        "a tokenizer that is not covered",
        where=str(folder / "tokenizer.json"),
        got=f"{kind}, {kinds}",
        expected="byte-level BPE as of gpt-2, smollm, llama 3 or qwen2",
    )


def _add_tokens(writer: Any, folder: Path, pre: str, size: int) -> None:
    """Tokens, their kinds, merges, special tokens and chat template."""
    import gguf

    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {index: token for token, index in rules["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for one in rules.get("added_tokens", ()):
        tokens[one["id"]] = one["content"]
        kinds[one["id"]] = gguf.TokenType.CONTROL if one.get("special") else gguf.TokenType.USER_DEFINED
    if max(tokens) >= size:
        raise UnsupportedError(
            "tokens beyond the model's vocabulary", where=str(folder), got=f"{max(tokens)} >= {size}"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([kinds.get(index, gguf.TokenType.UNUSED) for index in range(size)])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    special.add_special_token.setdefault("bos", _begins_with_bos(folder))
    template = folder / "chat_template.jinja"
    if special.chat_template is None and template.is_file():
        special.chat_template = template.read_text(encoding="utf-8")
    special.add_to_gguf(writer, quiet=True)


def _begins_with_bos(folder: Path) -> bool:
    """Whether the tokenizer itself puts a token in front of every text."""
    tokenizer = read_tokenizer(folder)
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _write(writer: Any, base: Mapped, tensors: list[GGUFTensor], factors: Tensor | None) -> None:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", tuple(factors.shape), np.dtype(np.float32), 4 * len(factors))
    for one in tensors:
        shape = tuple(base.stored(base.places[one.parameter]).shape)
        raw = {torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}.get(one.dtype, kinds.F32)
        size = torch.Size(shape).numel() * one.dtype.itemsize
        writer.add_tensor_info(one.name, shape, np.dtype(np.float32), size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.float().numpy())
    for one, value in _values(base, tensors):
        writer.write_tensor_data(value.to(one.dtype).reshape(-1).view(torch.uint8).numpy())
        base.forget(one.parameter)
    writer.close()


@torch.no_grad()
def _values(base: Mapped, tensors: list[GGUFTensor]) -> Iterator[tuple[GGUFTensor, Tensor]]:
    """Each tensor as llama.cpp wants its rows."""
    config: Any = base.model.config
    for one in tensors:
        value = base.stored(base.places[one.parameter])
        part = one.parameter.rpartition(".")[0].rpartition(".")[2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
        if heads and WRITTEN[config.model_type].gguf_pairs:
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)
        yield one, value.contiguous()


def _read_back(path: Path, base: Mapped, tensors: list[GGUFTensor]) -> None:
    """Compare numbers of every tensor with the file's. Raises `DiskError`."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for one, value in _values(base, tensors):
        wanted = value.to(one.dtype).reshape(-1)
        raw = np.ascontiguousarray(stored[one.name].data).reshape(-1).view(np.uint8)
        found = torch.from_numpy(raw.copy()).view(one.dtype)
        places = torch.arange(min(_SAMPLES, len(wanted))) * len(wanted) // min(_SAMPLES, len(wanted))
        if len(found) != len(wanted) or not torch.equal(found[places], wanted[places]):
            raise DiskError("what is read back is not what was written", where=f"{path}: {one.name}")
        base.forget(one.parameter)


def stop_of(folder: str | Path) -> str | None:
    """The text of the token that ends an answer."""
    return read_tokenizer(Path(folder)).eos_token


def modelfile(model: str, adapter: str | None = None, stop: str | None = None) -> str:
    """An Ollama Modelfile; the chat template is the one in the GGUF file."""
    lines = [f"FROM {model}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}"] if stop else []
    return "\n".join(lines) + "\n"
