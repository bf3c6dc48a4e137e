"""The parts of a decoder layer of the Llama family, as its fused and its cached forward read them.

h = x + o(attention(rotated(q), rotated(k), v))         q, k, v = linears(rms_norm(x))
y = h + down(act(gate) * up)                            gate, up = linears(rms_norm(h))
"""

from typing import Any

from torch import Tensor, nn

from gossamer.families import LAYERS
from gossamer.kernels.linears import ACTIVATIONS, Norm

QKV, OUTPUT, GATE_UP, DOWN = slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)
GROUPS = (QKV, OUTPUT, GATE_UP, DOWN)
"""Of the seven linear maps of a layer, those that read the same input."""


class LayerParts:
    """What a layer is made of.

    Attributes:
        attention: its attention module; scaling, window: of its scores.
        activation: name of the function between gate and up.
        norms: before attention and before the feed-forward block.
        linears: q, k, v, o, gate, up and down.
    """

    def __init__(self, layer: Any) -> None:
        family, attention = LAYERS[type(layer).__name__], layer.self_attn
        config, mlp = attention.config, layer.mlp
        self.attention, self.scaling, self.activation = attention, attention.scaling, config.hidden_act
        self.window = config.sliding_window if family.window else getattr(attention, "sliding_window", None)
        self.norms = [norm_of(one, family.offset) for one in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.linears: tuple[nn.Module, ...] = (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., heads, d) each, normed where the family norms its heads."""
        attention = self.attention
        query, key, value = (one.unflatten(-1, (-1, attention.head_dim)) for one in (query, key, value))
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        return query, key, value


def known(layer: Any) -> bool:
    """Whether a module is a decoder layer of the family, with an activation that the kernels have."""
    return type(layer).__name__ in LAYERS and layer.self_attn.config.hidden_act in ACTIVATIONS


def norm_of(module: Any, offset: bool) -> Norm:
    """A model's own RMSNorm as numbers; `offset` where it scales by `1 + weight`."""
    eps = module.eps if offset else module.variance_epsilon
    return Norm(module.weight, eps, offset)
