"""peft_type PREFIX_TUNING and PROMPT_TUNING: one tensor for the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.adapter import Adapter, Tensors
from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.files.layouts.layout import Layout, inside
from gossamer.methods import TargetedMethod
from gossamer.methods.prefix import PromptTuning, VirtualTokens
from gossamer.methods.virtual_tokens import SLOT

_PREFIX = "base_model."
_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
"""How a class name ends -> PEFT's word for what the model does, without which it does not use a prompt."""


_FILLED_IN = {"num_attention_heads": None, "num_layers": None, "token_dim": None}
_SAID = {"num_virtual_tokens": None, "modules_to_save": None}


class OnePrompt(Layout):
    """`prompt_embeddings` without a prefix. What the base's config says (layers, heads, width) PEFT fills in itself."""

    slots = (SLOT,)
    modelled = _SAID
    descriptive = _FILLED_IN

    @property
    def known(self) -> dict[str, Any]:
        return super().known | {"num_transformer_submodules": None}

    def can_say(self, spec: TargetedMethod) -> bool:
        return super().can_say(spec) and spec.target_modules == type(spec).model_fields["target_modules"].default

    def check_keys(self, config: Mapping[str, Any], where: str) -> None:
        super().check_keys(config, where)
        if config.get("num_transformer_submodules") not in (None, 1):
            got = f"num_transformer_submodules={config['num_transformer_submodules']!r}"
            raise UnsupportedError("this PEFT feature is not covered", where=where, got=got, expected="1")

    def split(self, name: str, where: str) -> tuple[str, str]:
        if name == SLOT:
            return "", SLOT
        path, _, slot = inside(name, _PREFIX, where).rpartition(".")
        return path, slot

    def targeted(self, config: Mapping[str, Any], tensors: Tensors, where: str) -> dict[str, Any]:
        return {}

    def fields(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"num_virtual_tokens": config.get("num_virtual_tokens")}

    def targets(self, tensors: Tensors) -> dict[str, Mapping[str, Tensor]]:
        return {path: slots for path, slots in tensors.items() if SLOT in slots}

    def check_module(self, path: str, slots: Mapping[str, Tensor], spec: TargetedMethod, where: str) -> None:
        assert isinstance(spec, VirtualTokens)
        count = spec.num_virtual_tokens
        shape = tuple(slots[SLOT].shape)
        if path or set(slots) != {SLOT} or len(shape) != 2 or shape[0] != count:
            raise AdapterFileError(
                "not the prompt that the config describes", where=where, got=str(shape), expected=f"({count}, ...)"
            )

    def name(self, path: str, slot: str, spec: TargetedMethod, slots: Mapping[str, Tensor]) -> str:
        return f"{_PREFIX}{path}.{slot}" if path else slot

    def said(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        assert isinstance(spec, VirtualTokens)
        return {"num_virtual_tokens": spec.num_virtual_tokens}

    def targeting(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        return {"modules_to_save": super().targeting(spec, tensors)["modules_to_save"]}

    def facts(self, adapter: Adapter, tensors: Tensors) -> dict[str, Any]:
        """The task, told by the class of the base; what the file said goes first."""
        name = str((adapter.base or {}).get("architecture"))
        task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
        return {"task_type": adapter.foreign.get("task_type") or task}


class PrefixLayout(OnePrompt):
    """(P, layers * 2 * heads of keys * their width)."""

    peft_type = "PREFIX_TUNING"
    methods = ("prefix",)
    descriptive = _FILLED_IN | {
        "encoder_hidden_size": None,
        "init_weights": None,
        "prefix_projection": False,
    }


class PromptLayout(OnePrompt):
    """(P, hidden)."""

    peft_type = "PROMPT_TUNING"
    methods = ("prompt",)
    modelled = _SAID | {"prompt_tuning_init": "RANDOM"}
    descriptive = _FILLED_IN | {
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }

    def fields(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        init = config.get("prompt_tuning_init", "RANDOM")
        start = {"RANDOM": "random", "SAMPLE_VOCAB": "vocabulary", "TEXT": "vocabulary"}.get(str(init), init)
        return super().fields(config, where) | {"start": start}

    def said(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        assert isinstance(spec, PromptTuning)
        init = "RANDOM" if spec.start == "random" else "SAMPLE_VOCAB"
        return super().said(spec, tensors) | {"prompt_tuning_init": init}
