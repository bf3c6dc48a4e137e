"""Virtual tokens: trained keys and values, or trained embeddings, that every token of a decoder may attend to.

Both live in the key-value cache. A call without one gets a cache that holds the P virtual tokens; so the output keeps
its T positions, real tokens stand at P, P + 1, ..., and `generate` carries the virtual tokens from step to step by
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.methods.base import Base, Layer, Shape
from gossamer.methods.peft import ConfigKey, PeftLayout, Stored, plain
from gossamer.methods.targeted import TargetedMethod
from gossamer.methods.virtual_tokens import (
    SLOT,
    PrefixLayer,
    PromptLayer,
    cache_shape,
    embeddings_of,
    refuse_other_caches,
)
from gossamer.spec import StrictInt

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
"""How a class name ends -> PEFT's word for what the model does, without which it does not use a prompt."""
_STARTS = {"RANDOM": "random", "SAMPLE_VOCAB": "vocabulary", "TEXT": "vocabulary"}


def _task(stored: Stored) -> str | None:
    """What the file said goes first; else the class of the base says it."""
    name = str((stored.adapter.base or {}).get("architecture"))
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    return stored.adapter.foreign.get("task_type") or task


def _one_transformer(value: Any, where: str) -> None:
    if value not in (None, 1):
        got = f"num_transformer_submodules={value!r}"
        raise UnsupportedError("this PEFT feature is not covered", where=where, got=got, expected="1")


def _check(spec: VirtualTokens, path: str, slots: Mapping[str, Tensor], where: str) -> None:
    count, shape = spec.num_virtual_tokens, tuple(slots[SLOT].shape)
    if path or set(slots) != {SLOT} or len(shape) != 2 or shape[0] != count:
        what = "not the prompt that the config describes"
        raise AdapterFileError(what, where=where, got=str(shape), expected=f"({count}, ...)")


def _layout(peft_type: str, descriptive: dict[str, Any], **keys: ConfigKey) -> PeftLayout:
    """One tensor for the whole model. What the base's config says (layers, heads, width) PEFT fills in itself."""
    return PeftLayout(
        peft_type,
        slots=plain(SLOT),
        whole_model={SLOT: SLOT},
        prefix="base_model.",
        keys={
            "num_virtual_tokens": ConfigKey(None, "num_virtual_tokens", read=lambda value, where: value),
            "num_transformer_submodules": ConfigKey(None, read=_one_transformer),
            "task_type": ConfigKey(None, write=_task),
            **keys,
        },
        targeting=("modules_to_save",),
        descriptive={"num_attention_heads": None, "num_layers": None, "token_dim": None, **descriptive},
        check=_check,
    )


class VirtualTokens(TargetedMethod):
    """What both methods share: how many virtual tokens, and which models can hold them."""

    stands_at: ClassVar[str] = "a transformers decoder with a key-value cache, attached to as a whole"

    num_virtual_tokens: Annotated[StrictInt, Field(ge=1, le=65536)] = 8
    """P, the number of virtual tokens."""

    def fits(self, shape: Shape) -> bool:
        if shape.kind == "model":
            refuse_other_caches(shape.config)
        return shape.kind == "model"


class PrefixTuning(VirtualTokens):
    """Prefix tuning: P trained keys and values in front of every layer's own.

    Equation:

        attention(Q, [P_k; K], [P_v; V])        in every layer

    Shapes: P_k and P_v are (P, kv heads, head dim) a layer, held as one tensor (P, layers * 2 * kv heads * head dim),
    that many trained numbers, PEFT's layout. It starts random, so the output moves at the start, unlike that of methods
    beside a weight.

    Cost: no parameter of the model runs twice; each attention reads P more keys.

    Merge: refused: no weight says the same.

    When to use it: to steer a model by very few numbers a task, or to compare with Hu et al., section 5.1
    ("prefix-layer"). There is no reparameterising MLP; files that PEFT trained with one hold the keys and values it
    gave, and read the same. Decoders with full attention in every layer are supported; others are refused by name.

    Learning rate: `lr: auto` is thirty times LoRA's, the best of four as measured on SmolLM2-135M: keys and values
    start random and have far to go, and there is no MLP that moves them.

    Source: Li and Liang 2021, arXiv:2101.00190, equation 3.
    """

    name: ClassVar[str] = "prefix"
    lr_over_lora: ClassVar[float] = 30.0
    peft: ClassVar[PeftLayout | None] = _layout(
        "PREFIX_TUNING", {"encoder_hidden_size": None, "init_weights": None, "prefix_projection": False}
    )

    def expected(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        layers, heads, size = cache_shape(shape.config)
        return {SLOT: (self.num_virtual_tokens, layers * 2 * heads * size)}

    def initial(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        ((name, size),) = self.expected(base.shape).items()
        return {name: torch.randn(size, generator=generator)}

    def build(self, shape: Shape, slots: Mapping[str, Tensor], common: nn.Module | None) -> Layer:
        return PrefixLayer(slots)


class PromptTuning(VirtualTokens):
    """Prompt tuning: P trained embeddings in front of the input's own.

    Equation:

        model([E; embed(x)])

    Shapes: E is (P, hidden), that many trained numbers. It starts as embeddings of drawn tokens or random, so the
    output moves at the start, unlike that of methods beside a weight.

    Cost: E runs through the model once for a batch, whatever its rows: for a causal model the keys and values it leaves
    in the cache are all that the tokens after it see of it.

    Merge: refused: no weight says the same.

    When to use it: where the fewest numbers a task are wanted from a large model, or to compare with Hu et al., section
    5.1 ("prefix-embedding", without infix tokens). Decoders with full attention in every layer are supported; others
    are refused by name.

    Learning rate: `lr: auto` is thirty times LoRA's, the best of three as measured on SmolLM2-135M. The paper's 0.3 is
    Adafactor's.

    Source: Lester et al. 2021, arXiv:2104.08691, section 2.
    """

    name: ClassVar[str] = "prompt"
    lr_over_lora: ClassVar[float] = 30.0
    peft: ClassVar[PeftLayout | None] = _layout(
        "PROMPT_TUNING",
        {"prompt_tuning_init_text": None, "tokenizer_kwargs": None, "tokenizer_name_or_path": None},
        prompt_tuning_init=ConfigKey("RANDOM", "start", _STARTS),
    )

    start: Literal["vocabulary", "random"] = "vocabulary"
    """How E starts: as the embeddings of tokens drawn from the vocabulary, or normal."""

    def expected(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        return {SLOT: (self.num_virtual_tokens, embeddings_of(shape).shape[1])}

    def initial(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        table = embeddings_of(base.shape).detach()
        if self.start == "random":
            return {SLOT: torch.randn(self.num_virtual_tokens, table.shape[1], generator=generator)}
        drawn = torch.randint(len(table), (self.num_virtual_tokens,), generator=generator)
        return {SLOT: table[drawn.to(table.device)].float()}

    def build(self, shape: Shape, slots: Mapping[str, Tensor], common: nn.Module | None) -> Layer:
        return PromptLayer(slots)
