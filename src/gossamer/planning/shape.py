"""What a model is made of: the numbers of its config, its linear modules by name, its parameters by kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

from gossamer.planning.parts import Part

KINDS = ("embedding", "attention", "mlp", "experts", "norm", "head")
"""The kinds that parameters are counted by."""

_LLAMA = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
_LLAMA |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_LLAMA |= {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj", "router": "mlp.gate", "layer": "model.layers"}
_NEOX = {"qkv": "attention.query_key_value", "o": "attention.dense"}
_NEOX |= {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h", "layer": "gpt_neox.layers"}
NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": _LLAMA,
    "gpt2": {
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "layer": "transformer.h",
    },
    "opt": _LLAMA | {"o": "self_attn.out_proj", "up": "fc1", "down": "fc2", "layer": "model.decoder.layers"},
    "gpt_neox": _NEOX,
    "falcon": {name: path.replace("attention", "self_attention") for name, path in _NEOX.items()}
    | {"layer": "transformer.h"},
    "bert": {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
    | {"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense", "layer": "encoder.layer"},
}
"""Family -> what its modules are called inside a layer, and where its layers lie."""


@dataclass(frozen=True)
class Linear:
    """One linear module of a layer."""

    role: str
    path: str
    inner: int
    outer: int
    bias: bool

    @property
    def weights(self) -> int:
        """Numbers in its matrix."""
        return self.inner * self.outer

    @property
    def parameters(self) -> int:
        """Numbers in its matrix and bias."""
        return self.weights + self.outer * self.bias


@dataclass(frozen=True)
class ModelShape:
    """A model as a planner needs it.

    Attributes:
        name: what to call it. family: a key of `NAMES`.
        layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary: the usual numbers.
        gated: whether the MLP multiplies two products. activation: by its name in configs.
        norm: "rms", "offset" (Gemma's `1 + w`) or "layer"; norms: of them in a layer. parallel: attention and MLP
            both read the layer's input. post: a norm stands behind its block (BERT).
        fused: attention's three products are one; fused_gate: so are the MLP's two.
        qkv_bias, output_bias, mlp_bias, head_bias: where biases are. head_norm: norms of queries and keys.
        rotary: share of each head that is rotated; positions, types: learned rows instead.
        tied: the head is the embedding. dtype: that the weights are stored in.
        experts, active: of the MLP, in all and for each token; shared: width of an MLP beside them.
        blocks: its decoder layers are of a class that this library has fused ones for.
        encoder: reads both ways, so that there is nothing to train it on here; head_norms: norms above the layers.
        root: where the layers lie, if elsewhere than in the family. parts: towers and projectors beside the language
            model, which is what all other numbers are of.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    intermediate: int
    family: str = "llama"
    kv_heads: int = 0
    head_dim: int = 0
    gated: bool = True
    activation: str = "silu"
    norm: str = "rms"
    norms: int = 2
    parallel: bool = False
    fused: bool = False
    fused_gate: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    head_norm: bool = False
    rotary: float = 1.0
    positions: int = 0
    types: int = 0
    tied: bool = False
    dtype: str = "bfloat16"
    experts: int = 0
    active: int = 0
    encoder: bool = False
    blocks: bool = True
    root: str = ""
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden // self.heads)

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; values are as wide."""
        return self.kv_heads * self.head_dim

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear modules of one layer, in the order they run."""
        names, h, f = NAMES[self.family], self.hidden, self.intermediate

        def linear(role: str, inner: int, outer: int, bias: bool) -> Linear:
            return Linear(role, names[role], inner, outer, bias)

        if self.fused:
            found = [linear("qkv", h, self.queries + 2 * self.keys, self.qkv_bias)]
        else:
            found = [linear("q", h, self.queries, self.qkv_bias)]
            found += [linear(role, h, self.keys, self.qkv_bias) for role in ("k", "v")]
        found.append(linear("o", self.queries, h, self.output_bias))
        if self.experts:
            return tuple(found)
        if self.fused_gate:
            found.append(linear("gate_up", h, 2 * f, self.mlp_bias))
        else:
            found += [linear(role, h, f, self.mlp_bias) for role in (("gate", "up") if self.gated else ("up",))]
        return (*found, linear("down", f, h, self.mlp_bias))

    def path(self, linear: Linear, layer: int) -> str:
        """The full path of a module."""
        return f"{self.root or NAMES[self.family]['layer']}.{layer}.{linear.path}"

    @property
    def norm_width(self) -> int:
        """Numbers in one norm of a whole row."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def expert_weights(self) -> int:
        """Numbers in one expert."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters by kind, and of each other part; a tied head counts nothing."""
        inside = {"attention": 0, "mlp": 0}
        for linear in self.linears:
            inside["attention" if linear.role in ("q", "k", "v", "qkv", "o") else "mlp"] += linear.parameters
        rows = self.vocabulary + self.positions + self.types
        norms = self.layers * (self.norms * self.norm_width + 2 * self.head_dim * self.head_norm) + self.norm_width
        experts = self.experts * (self.expert_weights + self.hidden)  # and a row of the router for each
        head = self.vocabulary * (self.hidden * (not self.tied) + self.head_bias)
        head += self.hidden * (self.hidden + 1) * self.encoder  # its pooler
        counts = (rows * self.hidden, *(self.layers * n for n in (*inside.values(), experts)), norms, head)
        found = {kind: count for kind, count in zip(KINDS, counts, strict=True) if count}
        return found | {part.name: part.parameters for part in self.parts}

    @property
    def language(self) -> int:
        """Parameters of the language model."""
        return self.total - sum(part.parameters for part in self.parts)

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def quantisable(self) -> int:
        """Weights of linear modules other than the head, which are what quantisation packs."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def multiplied(self) -> int:
        """Weights that one token is multiplied with: all matrices, of the experts the active ones, and the head."""
        experts = self.active * self.expert_weights + self.experts * self.hidden
        return self.quantisable + self.layers * experts + self.vocabulary * self.hidden


FIELDS = {field.name: field for field in fields(ModelShape)}
"""The numbers that can be typed in."""
