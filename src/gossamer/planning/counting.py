"""A model of the real classes, on the meta device, counted: its parameters by kind, its linear modules, its towers."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from gossamer.errors import UnsupportedError
from gossamer.planning import fake
from gossamer.planning.shape import KINDS, Counted, LinearShape, ModelShape, Tower
from gossamer.quant import quantizable


def shape_of_module(model: nn.Module, name: str = "", origin: str = "") -> ModelShape:
    """The numbers of a model; of one of several parts they are its language model's. Raises `UnsupportedError`."""
    whole: Any = getattr(model, "config", None)
    config: Any = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    found = max(fake.stacks(_language(model)).items(), key=lambda one: one[1], default=None)
    prefix = next((path for path, one in model.named_modules() if one is _language(model)), "")
    root = "" if found is None else f"{prefix}.{found[0]}".removeprefix(".")
    stack: Any = model.get_submodule(root) if found else [model]
    layers: list[nn.Module] = [*stack]
    kinds, towers = _counts(model)

    def number(*names: str) -> int:
        return next((value for one in names if isinstance(value := getattr(config, one, None), int)), 0)

    heads = number("num_attention_heads", "n_head", "num_heads")
    embedding, head = _embeddings(model)
    return ModelShape(
        name or str(getattr(whole, "model_type", type(model).__name__)),
        len(layers),
        number("hidden_size", "n_embd", "d_model"),
        heads,
        number("vocab_size"),
        number("intermediate_size", "ffn_dim", "n_inner", "d_ff"),
        number("num_key_value_heads"),
        number("head_dim"),
        tied=head is not None and embedding is not None and head.weight is embedding.weight,
        family=str(getattr(whole, "model_type", type(model).__name__)),
        counted=Counted(tuple(kinds.items()), tuple(_linears(layers[0])), root, towers, _multiplied(model, towers)),
        module=model,
        origin=origin or f"module {id(model)}",
    )


def _language(model: Any) -> nn.Module:
    """The part that reads text, of a model that has others; else the model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return model
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _embeddings(model: Any) -> tuple[Any, Any]:
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None, None


def _linears(model: nn.Module) -> Iterator[LinearShape]:
    module: Any
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or quantizable(module):
            outer, inner = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            yield LinearShape(path, inner, outer, module.bias is not None)


def _counts(model: nn.Module) -> tuple[dict[str, int], tuple[Tower, ...]]:
    language = _language(model)
    embedding, head = _embeddings(model)
    inside = {id(one) for part in (language, embedding, head) if part is not None for one in part.parameters()}
    kinds: dict[str, int] = {}
    outside: dict[str, int] = {}
    for path, parameter in model.named_parameters():
        if id(parameter) in inside:
            kind = _kind(model, path, head)
            kinds[kind] = kinds.get(kind, 0) + parameter.numel()
        else:
            outside[_part(path)] = outside.get(_part(path), 0) + parameter.numel()
    linears = [*_linears(model)] if outside else []
    towers = tuple(
        Tower(one, count, tuple(at for at in linears if _part(at.path) == one)) for one, count in outside.items()
    )
    ordered = {kind: kinds[kind] for kind in (*KINDS, "other") if kind in kinds}
    return ordered | outside, towers


def _kind(model: nn.Module, path: str, head: Any) -> str:
    owner = model.get_submodule(path.rpartition(".")[0])
    if owner is head:
        return "head"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if "norm" in type(owner).__name__.lower() or "norm" in path.rpartition(".")[0].rpartition(".")[2]:
        return "norm"
    if "expert" in path or "router" in path or type(owner).__name__.endswith("Router"):
        return "experts"
    within = path.lower()
    if "attn" in within or "attention" in within:
        return "attention"
    return "mlp" if isinstance(owner, nn.Linear) or quantizable(owner) else "other"


def _multiplied(model: Any, towers: tuple[Tower, ...]) -> int:
    beside = tuple(one.name for one in towers)
    config: Any = getattr(model, "config", None)
    active = getattr(
        config.get_text_config() if hasattr(config, "get_text_config") else config, "num_experts_per_tok", 1
    )
    embedding, head = _embeddings(model)
    total = 0
    for path, one in model.named_parameters():
        if (
            _part(path) in beside
            or one.dim() < 2
            or isinstance(model.get_submodule(path.rpartition(".")[0]), nn.Embedding)
        ):
            continue
        total += one.numel() * active // one.shape[0] if one.dim() == 3 and "expert" in path else one.numel()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return total
    return total + head.weight.numel()


def _part(path: str) -> str:
    """The name of the part: the first that is not the model's own prefix."""
    names = path.split(".")
    return names[1] if names[0] == "model" and len(names) > 2 else names[0]


def refuse_in_towers(shape: ModelShape, paths: list[str], patterns: Any) -> None:
    """What is adapted in a tower would be trained by images or sounds, which a plan of text does not follow."""
    names = {one.name for one in shape.towers}
    found = next((path for path in paths if _part(path) in names), None)
    if found is not None:
        raise UnsupportedError(
            "the plan knows adapters at the language model alone, and these patterns name modules of another part",
            where=found,
            got=str(patterns),
            hint=f"all-linear, or a regular expression for paths below {shape.counted.root if shape.counted else ''}",
        )
