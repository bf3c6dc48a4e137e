"""What a model is made of: the usual numbers, its linear modules by name, its parameters by kind.

Those of a few models are typed in, so that a plan for them needs no file and no network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

KINDS = ("embedding", "attention", "mlp", "experts", "norm", "head")
"""The kinds that parameters are counted by; what is none of them is "other"."""


@dataclass(frozen=True)
class LinearShape:
    """One linear module: its path (inside a layer, or in the model), inner and outer width."""

    path: str
    inner: int
    outer: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Numbers in its matrix."""
        return self.inner * self.outer


@dataclass(frozen=True)
class Tower:
    """What a model has beside its language model: a tower or projector, by the model's own name for it."""

    name: str
    parameters: int
    linears: tuple[LinearShape, ...]


@dataclass(frozen=True)
class Counted:
    """What was counted on the real classes.

    Attributes:
        parameters: kind -> parameters. linears: of one layer. root: where the layers lie. towers: beside the language
            model. multiplied: weights that one token meets.
    """

    parameters: tuple[tuple[str, int], ...]
    linears: tuple[LinearShape, ...]
    root: str
    towers: tuple[Tower, ...]
    multiplied: int


@dataclass(frozen=True)
class ModelShape:
    """A model as a planner needs it: counted on its real classes, or numbers given by hand, of a Llama or an OPT.

    Attributes:
        name: what to call it. layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary: the usual numbers;
            0 where a model has none.
        gated: whether the MLP multiplies two products, as in Llama; without, given numbers are of an OPT.
        tied: the head is the embedding. dtype: that the weights are stored in. positions: learned ones, of an OPT.
        family: the model's type, as transformers calls it.
        counted: what the real classes have, where they were looked at. module: the model on the meta device. origin:
            what tells it from other models that were counted alike: its config, or which object it is.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    intermediate: int
    kv_heads: int = 0
    head_dim: int = 0
    gated: bool = True
    tied: bool = False
    positions: int = 2048
    dtype: str = "bfloat16"
    family: str = ""
    counted: Counted | None = None
    module: Any = field(default=None, compare=False, repr=False)
    origin: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name, value in (
            ("kv_heads", self.kv_heads or self.heads),
            ("head_dim", self.head_dim or self.hidden // max(1, self.heads)),
            ("family", self.family or ("llama" if self.gated else "opt")),
        ):
            object.__setattr__(self, name, value)

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def towers(self) -> tuple[Tower, ...]:
        """Towers and projectors beside the language model."""
        return self.counted.towers if self.counted else ()

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """The linear modules of one layer, in the order of the model."""
        if self.counted:
            return self.counted.linears
        h, f, q, k, bias = self.hidden, self.intermediate, self.queries, self.keys, not self.gated
        names = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj" if self.gated else "out_proj": (q, h)}
        sizes = {f"self_attn.{name}": size for name, size in names.items()}
        mlp = {"mlp.gate_proj": (h, f), "mlp.up_proj": (h, f), "mlp.down_proj": (f, h)}
        sizes |= mlp if self.gated else {"fc1": (h, f), "fc2": (f, h)}
        return tuple(LinearShape(path, *size, bias) for path, size in sizes.items())

    def path(self, linear: LinearShape, layer: int) -> str:
        """The full path of a module of a layer."""
        root = self.counted.root if self.counted else "model.layers" if self.gated else "model.decoder.layers"
        return f"{root}.{layer}.{linear.path}"

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters by kind, and of each tower; a tied head counts nothing."""
        if self.counted:
            return dict(self.counted.parameters)
        inside = {"attention": 0, "mlp": 0}
        for one in self.linears:
            inside["attention" if "attn" in one.path else "mlp"] += self.layers * (one.weights + one.bias * one.outer)
        rows = self.vocabulary + (0 if self.gated else self.positions + 2)
        norms = (2 * self.layers + 1) * self.hidden * (1 if self.gated else 2)
        head = 0 if self.tied else self.vocabulary * self.hidden
        return {"embedding": rows * self.hidden, **inside, "norm": norms} | ({"head": head} if head else {})

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def multiplied(self) -> int:
        """Weights that one token is multiplied with: all matrices, of the experts the active ones, and the head."""
        if self.counted:
            return self.counted.multiplied
        return self.layers * sum(one.weights for one in self.linears) + self.vocabulary * self.hidden

    def config(self) -> Mapping[str, Any]:
        """What transformers makes the given numbers into."""
        common = {"num_hidden_layers": self.layers, "hidden_size": self.hidden, "num_attention_heads": self.heads}
        common |= {"vocab_size": self.vocabulary, "tie_word_embeddings": self.tied, "model_type": self.family}
        if not self.gated:
            wide = {"word_embed_proj_dim": self.hidden, "max_position_embeddings": self.positions, "dropout": 0.0}
            return common | wide | {"ffn_dim": self.intermediate}
        heads = {"num_key_value_heads": self.kv_heads, "head_dim": self.head_dim}
        return common | heads | {"intermediate_size": self.intermediate, "max_position_embeddings": 2**17}


FIELDS = {one.name: one for one in fields(ModelShape) if one.name not in ("counted", "module", "origin")}
"""The numbers that can be typed in."""


_LLAMA3 = 128_256
_SHAPES = (
    ModelShape("smollm2-135m", 30, 576, 9, 49_152, 1536, kv_heads=3, tied=True),
    ModelShape("llama-3.2-1b", 16, 2048, 32, _LLAMA3, 8192, kv_heads=8, tied=True),
    ModelShape("llama-3.2-3b", 28, 3072, 24, _LLAMA3, 8192, kv_heads=8, tied=True),
    ModelShape("llama-3.1-8b", 32, 4096, 32, _LLAMA3, 14_336, kv_heads=8),
    ModelShape("llama-3.1-70b", 80, 8192, 64, _LLAMA3, 28_672, kv_heads=8),
    ModelShape("llama-3.1-405b", 126, 16_384, 128, _LLAMA3, 53_248, kv_heads=8),
    ModelShape("llama-2-7b", 32, 4096, 32, 32_000, 11_008, dtype="float16"),
    ModelShape("llama-65b", 80, 8192, 64, 32_000, 22_016, dtype="float16"),
    ModelShape("gpt-3-175b", 96, 12_288, 96, 50_257, 4 * 12_288, gated=False, tied=True, dtype="float16"),
)  # fmt: skip
KNOWN = {shape.name: shape for shape in _SHAPES}
"""Name -> numbers."""


def known(name: str) -> ModelShape | None:
    """The model of that name, or of a hub id that means it: "meta-llama/Llama-3.1-8B-Instruct"."""
    short = name.rpartition("/")[2].lower().removeprefix("meta-").removesuffix("-hf").removesuffix("-instruct")
    return KNOWN.get({"gpt-3": "gpt-3-175b", "gpt3": "gpt-3-175b"}.get(short, short))
