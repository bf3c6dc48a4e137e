"""The table of cases on which PEFT and Gossamer are compared: architecture x method x config x dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Fields = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """What the parts of one architecture are called, as suffixes of their paths."""

    first: str
    """A matrix of the attention."""
    second: str
    """A matrix of the feedforward part, the last one as a rule."""
    scaled: tuple[str, ...]
    """Keys and values, or what holds them."""
    norms: tuple[str, ...]
    """All normalisations."""
    norm: str
    """A normalisation to train whole; no other path ends like it."""
    head: str | None = None
    """A head that shares its weight with no embedding."""
    embedding: str | None = None
    tied: bool = False
    """Whether the embedding's weight is another module's too."""
    convolutions: tuple[str, ...] = ()
    experts: bool = False
    decoder: bool = False


_KEYS = ("k_proj", "v_proj")
_LLAMA = Parts(
    "q_proj",
    "down_proj",
    _KEYS,
    ("input_layernorm", "post_attention_layernorm", "norm"),
    "model.norm",
    "lm_head",
    "embed_tokens",
    decoder=True,
)
_MIXTURE = Parts(
    "q_proj", "o_proj", _KEYS, _LLAMA.norms, "model.norm", "lm_head", "embed_tokens", experts=True, decoder=True
)
_BERT = Parts(
    "query", "output.dense", ("key", "value"), ("LayerNorm",), "embeddings.LayerNorm", "classifier", "word_embeddings"
)
_BART_NORMS = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layernorm_embedding")

ARCHITECTURES: dict[str, Parts] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTURE,
    "qwen2": _LLAMA,
    "qwen3_moe": _MIXTURE,
    "gemma": Parts("q_proj", "down_proj", _KEYS, _LLAMA.norms, "model.norm", None, "embed_tokens", True, decoder=True),
    "gemma3": Parts(
        "q_proj",
        "down_proj",
        _KEYS,
        (*_LLAMA.norms, "q_norm", "k_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        "model.norm",
        None,
        "embed_tokens",
        True,
    ),
    "phi": Parts(
        "q_proj",
        "fc2",
        _KEYS,
        ("input_layernorm", "final_layernorm"),
        "final_layernorm",
        "lm_head",
        "embed_tokens",
        decoder=True,
    ),
    "gpt2": Parts(
        "c_attn", "mlp.c_proj", ("c_attn",), ("ln_1", "ln_2", "ln_f"), "ln_f", None, "wte", True, decoder=True
    ),
    "gpt_neox": Parts(
        "query_key_value",
        "dense_4h_to_h",
        ("query_key_value",),
        ("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
        "gpt_neox.final_layer_norm",
        "lm_head",
        "embed_in",
        decoder=True,
    ),
    "opt": Parts(
        "out_proj",
        "fc2",
        _KEYS,
        ("self_attn_layer_norm", "final_layer_norm"),
        "decoder.final_layer_norm",
        None,
        "embed_tokens",
        True,
        decoder=True,
    ),
    "falcon": Parts(
        "query_key_value",
        "dense_4h_to_h",
        ("query_key_value",),
        ("input_layernorm", "ln_f"),
        "ln_f",
        None,
        "word_embeddings",
        True,
        decoder=True,
    ),
    "bloom": Parts(
        "query_key_value",
        "dense_4h_to_h",
        ("query_key_value",),
        ("word_embeddings_layernorm", "input_layernorm", "post_attention_layernorm", "ln_f"),
        "ln_f",
        None,
        "word_embeddings",
        True,
        decoder=True,
    ),
    "t5": Parts(
        "SelfAttention.q",
        "wo",
        ("k", "v"),
        ("layer_norm", "final_layer_norm"),
        "decoder.final_layer_norm",
        None,
        "shared",
        True,
    ),
    "bart": Parts("q_proj", "fc2", _KEYS, _BART_NORMS, "decoder.layernorm_embedding", None, "shared", True),
    "bert": _BERT,
    "roberta": _BERT,
    "deberta_v2": Parts(
        "query_proj",
        "output.dense",
        ("key_proj", "value_proj"),
        ("LayerNorm",),
        "embeddings.LayerNorm",
        "classifier",
        "word_embeddings",
    ),
    "vit": Parts(
        "q_proj",
        "fc2",
        _KEYS,
        ("layernorm_before", "layernorm_after", "layernorm"),
        "vit.layernorm",
        "classifier",
        convolutions=("projection",),
    ),
    "clip": Parts(
        "q_proj",
        "fc2",
        _KEYS,
        ("layer_norm1", "layer_norm2", "pre_layrnorm", "post_layernorm", "final_layer_norm"),
        "post_layernorm",
        "visual_projection",
        "token_embedding",
        convolutions=("patch_embedding",),
    ),
    "whisper": Parts(
        "q_proj",
        "fc2",
        _KEYS,
        ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layer_norm"),
        "decoder.layer_norm",
        None,
        "embed_tokens",
        True,
        convolutions=("conv1", "conv2"),
    ),
}

TOKENS = (249, 3)
"""Trained rows; every text of the toys holds the first."""
Config = Callable[[Parts], Fields | None]
"""Fields of our spec beside the method's usual ones; None where the architecture lacks what the config is about."""


def where(part: Any, fields: Fields) -> Fields | None:
    """The fields, where the architecture has the part."""
    return fields if part else None


_PLAIN: dict[str, Config] = {
    "plain": lambda parts: {},
    "rslora": lambda parts: {"scaling": "rslora"},
    "patterns": lambda parts: {"rank_pattern": {parts.first: 5}, "alpha_pattern": {parts.second: 3.0}},
    "patterns, rslora": lambda parts: {
        "rank_pattern": {parts.first: 5},
        "alpha_pattern": {rf"\w+\.\d+\..*{parts.first}": 4.5},
        "scaling": "rslora",
    },
    "all biases": lambda parts: {"bias": "all"},
    "own biases": lambda parts: {"bias": "lora_only"},
    "embedding": lambda parts: where(parts.embedding, {"target_modules": (parts.first, parts.embedding)}),
    "convolution": lambda parts: where(parts.convolutions, {"target_modules": (parts.first, *parts.convolutions)}),
    "head trained": lambda parts: where(parts.head, {"modules_to_save": (parts.head,)}),
}
_NAMED: dict[str, Config] = {
    "norm trained": lambda parts: {"modules_to_save": (parts.norm,)},
    "one layer": lambda parts: {"layers_to_transform": (1,)},
    "all-linear": lambda parts: {"target_modules": "all-linear"},
    "expression": lambda parts: {"target_modules": rf".*\.1\..*({parts.first}|{parts.second})"},
    "excluded": lambda parts: {"exclude_modules": rf".*\.1\..*{parts.second}"},
    "tokens": lambda parts: where(parts.embedding, {"trainable_tokens": {parts.embedding: TOKENS}}),
    "old file": lambda parts: {},
}
_EXPERTS: dict[str, Config] = {
    "experts": lambda parts: where(parts.experts, {"target_parameters": ("experts.gate_up_proj", "experts.down_proj")}),
    "experts alone, rslora": lambda parts: where(
        parts.experts,
        {
            "target_modules": (),
            "target_parameters": ("experts.down_proj", "experts.gate_up_proj"),
            "scaling": "rslora",
        },
    ),
    "one expert matrix": lambda parts: where(parts.experts, {"target_parameters": ("experts.gate_up_proj",)}),
}

CONFIGS: dict[str, dict[str, Config]] = {
    "lora": _PLAIN | _NAMED | _EXPERTS,
    "dora": _PLAIN,
    "ia3": {
        "plain": lambda parts: {},
        "attention only": lambda parts: {"target_modules": parts.scaled, "feedforward_modules": ()},
        "norm trained": _NAMED["norm trained"],
        "expression": lambda parts: {
            "target_modules": rf".*({parts.first}|{parts.second})",
            "feedforward_modules": rf".*{parts.second}",
        },
        "convolution": lambda parts: where(parts.convolutions, {"target_modules": (parts.second, *parts.convolutions)}),
    },
    "vera": {"stored": lambda parts: {}, "drawn": lambda parts: {"projection_seed": 7}},
    "norm": {
        "plain": lambda parts: {},
        "head trained": _PLAIN["head trained"],
    },
    "prefix": {"plain": lambda parts: where(parts.decoder, {})},
    "prompt": {
        "plain": lambda parts: where(parts.decoder, {}),
        "norm trained": lambda parts: where(parts.decoder, {"modules_to_save": (parts.norm,)}),
    },
}


def _usual(method: str, parts: Parts) -> Fields:
    """What every config of a method begins with."""
    both: Fields = {"target_modules": (parts.first, parts.second)}
    return {
        "lora": {"r": 3, "alpha": 6.0} | both,
        "dora": {"r": 3, "alpha": 6.0} | both,
        "ia3": {"target_modules": (*parts.scaled, parts.second), "feedforward_modules": (parts.second,)},
        "vera": {"r": 5} | both,
        "norm": {"target_modules": parts.norms},
        "prefix": {"num_virtual_tokens": 3},
        "prompt": {"num_virtual_tokens": 3},
    }[method]


HALF = {("lora", "plain"), ("lora", "norm trained"), ("dora", "plain"), ("ia3", "plain"), ("vera", "stored")}
HALF |= {("norm", "plain"), ("prefix", "plain"), ("prompt", "plain")}
"""Methods and configs that are compared in bfloat16 too."""

REFUSED: dict[tuple[str, str], str] = {
    ("gemma3", "prefix"): "sliding window",
    ("gemma3", "prompt"): "sliding window",
} | {
    (name, method): "a transformers decoder"
    for name in ("t5", "bart", "bert", "roberta", "deberta_v2", "vit", "clip", "whisper")
    for method in ("prefix", "prompt")
}
"""Architecture and method that Gossamer refuses -> words of the error."""

_MIXTURES = ("mixtral", "qwen3_moe")
NOT_BY_PEFT: dict[tuple[str, str, str], str] = {
    ("falcon", "prefix", "plain"): "it makes keys for every query head, and Falcon has one key head",
    ("whisper", "lora", "convolution"): "its wrapper hides `conv1.stride`, which Whisper reads",
    ("whisper", "dora", "convolution"): "the same",
    ("whisper", "ia3", "convolution"): "the same; and it has no vectors beside a Conv1d",
} | {
    (name, "lora", config): why
    for name in _MIXTURES
    for config, why in (
        ("all-linear", "it adapts the router, which is no linear module, and writes that as a stacked matrix"),
        ("expression", "it takes the expression apart into suffixes and adapts other layers too"),
    )
}
"""Architecture, method and config that PEFT cannot run, or not as it says -> why.

They are no cases; `test_where_peft_is_wrong.py` and the tests of prefixes hold what can be said of them.
"""


@dataclass(frozen=True)
class Case:
    """One comparison."""

    architecture: str
    method: str
    config: str
    dtype: str

    def __str__(self) -> str:
        return "-".join((self.architecture, self.method, self.config, self.dtype))

    @property
    def fields(self) -> Fields:
        """All fields of our spec."""
        parts = ARCHITECTURES[self.architecture]
        return _usual(self.method, parts) | (CONFIGS[self.method][self.config](parts) or {})

    @property
    def merges(self) -> bool:
        """Whether a weight can say the same; not where another module shares it."""
        tied = self.config == "embedding" and ARCHITECTURES[self.architecture].tied
        return self.method not in ("prefix", "prompt") and not tied


def _cases(method: str, config: str, dtype: str) -> list[Case]:
    """The cases of one config, an architecture each."""
    return [
        Case(name, method, config, dtype)
        for name, parts in ARCHITECTURES.items()
        if isinstance(CONFIGS[method][config](parts), dict)
        and (name, method) not in REFUSED
        and (name, method, config) not in NOT_BY_PEFT
        # in half precision a rounding can send a token to another expert, and then nothing need be close any more
        and not (parts.experts and dtype == "bfloat16")
    ]


_GROUPS = [
    _cases(method, config, dtype)
    for method, configs in CONFIGS.items()
    for config in configs
    for dtype in ("float32", "bfloat16")[: 1 + ((method, config) in HALF)]
]
_STEP = 6
CASES = [case for group in _GROUPS for case in group]
SLICE = [case for number, group in enumerate(_GROUPS) for case in group[number % min(_STEP, len(group)) :: _STEP]]
"""The cases of a short run: every sixth of each config, beginning with another architecture each time."""
