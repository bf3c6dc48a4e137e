"""What a model of several parts has beside its language model: towers, projectors; counted on transformers' classes.

No formula is written down for towers, of which every family has another. The model is built without memory (torch's
meta device) from its config, which is why this alone of the plan takes torch and transformers, and takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gossamer.errors import UnsupportedError


@dataclass(frozen=True)
class Part:
    """A tower or projector.

    Attributes:
        name: what the model calls it. parameters: how many numbers it has.
        linears: path, inner and outer width of each of its linear modules.
    """

    name: str
    parameters: int
    linears: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Parts:
    """A model of several parts.

    Attributes:
        text: the config of its language model. layers: where that model's layers lie.
        language: how many parameters the language model has, with its head. tied: its head is its embedding.
        others: the other parts.
    """

    text: Mapping[str, Any]
    layers: str
    language: int
    tied: bool
    others: tuple[Part, ...]


def composite(config: Mapping[str, Any]) -> bool:
    """Whether a config describes several models."""
    return any(key.endswith("_config") and "model_type" in value for key, value in config.items() if _object(value))


def parts_of(config: Mapping[str, Any], name: str = "") -> Parts:
    """The parts of a composite config. Raises `UnsupportedError` where transformers does not know the model."""
    try:
        described, model = _built(config)
        language = model.get_decoder()
        paths = {id(module): path for path, module in model.named_modules()}
        root = paths[id(language)]
        text = described.get_text_config().to_dict()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        inside = {
            id(one) for module in (language, embedding, head) if module is not None for one in module.parameters()
        }
        layers = f"{root}.layers"
        model.get_submodule(f"{layers}.0")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnsupportedError(
            "the plan cannot count the parts of this model",
            where=name,
            got=f"{config.get('model_type')}: {reason}",
            hint="plan for its text_config alone, as a file of its own; towers are not in that total",
        ) from None
    counted: dict[str, int] = {}
    linears: dict[str, list[tuple[str, int, int]]] = {}
    for path, parameter in model.named_parameters():
        if id(parameter) not in inside:
            part = _part(path)
            counted[part] = counted.get(part, 0) + parameter.numel()
            owner = model.get_submodule(path.rpartition(".")[0])
            if type(owner).__name__ == "Linear" and path.endswith(".weight"):
                outer, inner = parameter.shape
                linears.setdefault(part, []).append((path.removesuffix(".weight"), inner, outer))
    others = tuple(Part(part, number, tuple(linears.get(part, ()))) for part, number in counted.items())
    whole = sum(parameter.numel() for parameter in model.parameters())
    tied = head is not None and head.weight is embedding.weight
    return Parts(text, layers, whole - sum(counted.values()), tied, others)


def _built(config: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch
    import transformers

    described = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    named = [getattr(transformers, str(one), None) for one in config.get("architectures") or ()]
    kind: Any = next(
        (one for one in named if isinstance(one, type) and issubclass(one, transformers.PreTrainedModel)), None
    )
    with torch.device("meta"):
        if kind is not None:
            return described, kind(described)
        return described, transformers.AutoModelForImageTextToText.from_config(described)


def _part(path: str) -> str:
    """The name of the part: the first that is not the model's own prefix."""
    names = path.split(".")
    return names[1] if names[0] == "model" and len(names) > 2 else names[0]


def _object(value: Any) -> bool:
    return isinstance(value, Mapping)
