"""peft_type LORA: LoRA, rsLoRA and DoRA at linear modules, embeddings, convolutions, attention and stacked experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.adapter import Adapter, Tensors
from gossamer.errors import AdapterFileError, StateError, UnsupportedError
from gossamer.files.layouts import copies, experts, stacked, tokens
from gossamer.files.layouts.layout import PREFIX, Layout, inside, listed, place, plain_number
from gossamer.methods import TargetedMethod
from gossamer.methods.dora import MAGNITUDE
from gossamer.methods.factored import Factored
from gossamer.methods.lora import plain_slots, plain_spec
from gossamer.methods.targeted import exactly
from gossamer.methods.tokens import SLOT

PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
OWN = frozenset((*PAIRS[0], *PAIRS[1], MAGNITUDE))
PLAIN_STARTS = ("gaussian", "kaiming")
_UNCHANGED = ("eva", "mica", "orthogonal")
"""Further starts of PEFT's after which the base is what it was, so that the factors alone are the adapter."""

_ENDINGS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    f".{MAGNITUDE}": MAGNITUDE,
    f".token_adapter.{SLOT}": SLOT,
}
"""How PEFT names our slots."""
_OLDER = {f".{MAGNITUDE}.weight": MAGNITUDE}
_ENDING_OF = {slot: ending for ending, slot in _ENDINGS.items()}


class LoRALayout(Layout):
    """Factors beside modules; experts' and attention's own matrices as PEFT's wrappers nest them."""

    peft_type = "LORA"
    methods = ("lora", "dora")
    slots = tuple(OWN)
    assumed = ("r", "lora_alpha")
    modelled = {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": None,
        "target_parameters": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "trainable_token_indices": None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    descriptive = {"fan_in_fan_out": False, "megatron_core": "megatron.core", "qalora_group_size": 16}
    inert = {
        "corda_config": None,  # how a start is made; whether the file is relative to it, init_lora_weights says
        "eva_config": None,
        "loftq_config": {},
        "lora_ga_config": None,
        "velora_config": None,  # how activations are kept for the backward
    }
    refused = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "kasa_config": None,
        "layer_replication": None,
        "lora_bias": False,
        "megatron_config": None,
        "monteclora_config": None,
        "use_bdlora": None,
        "use_qalora": False,
    }

    def can_say(self, spec: TargetedMethod) -> bool:
        return True

    # Reading ---------------------------------------------------------------------------------------------------------

    def sorted_out(self, stored: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Tensors:
        tensors: dict[str, dict[str, Tensor]] = {}
        nested: stacked.Nested = {}
        bases: dict[str, Tensor] = {}
        wrapped = stacked.any_wrapped(stored, config)
        for name, tensor in stored.items():
            path, slot = self.split(name, where)
            if wrapped and slot in PAIRS[0]:
                stacked.collect(nested, path, slot, tensor)
            elif slot == "weight" and path.endswith(".base_layer"):
                bases[path.removesuffix(".base_layer")] = tensor
            else:
                place(tensors, path.removesuffix(".base_layer"), slot, tensor, f"{where}: {name}")
        for path, slot, tensor in stacked.unnested(nested, config, where):
            place(tensors, path, slot, tensor, where)
        copies.dropped(bases, tensors, where)
        return tensors

    def split(self, name: str, where: str) -> tuple[str, str]:
        name = inside(name, PREFIX, where)
        for endings in (_ENDINGS, _OLDER):
            for ending, slot in endings.items():
                if name.endswith(ending):
                    return name[: -len(ending)], slot
        if name.endswith(".lora_B.bias"):
            raise UnsupportedError("this PEFT feature is not covered", where=f"{where}: {name}", got="lora_bias")
        path, _, slot = name.rpartition(".")
        return path, slot

    def renewed(self, config: dict[str, Any], tensors: Tensors, where: str) -> tuple[dict[str, Any], Tensors]:
        if not experts.is_old(tensors):
            return config, tensors
        spec = self.spec(config, tensors, where)
        assert isinstance(spec, Factored)
        return experts.stacked_anew(config, tensors, spec, where)

    def method(self, config: Mapping[str, Any]) -> str:
        return "dora" if config.get("use_dora") else "lora"

    def targeted(self, config: Mapping[str, Any], tensors: Tensors, where: str) -> dict[str, Any]:
        if not config.get("target_parameters"):
            return super().targeted(config, tensors, where)
        if config.get("exclude_modules") or config.get("layers_to_transform") is not None:  # not of PEFT's parameters
            named = {"target_modules": listed(exactly(self.named_targets(tensors)))}
            return super().targeted(named, tensors, where)
        return super().targeted(dict(config) | {"target_modules": config.get("target_modules") or []}, tensors, where)

    def fields(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        flags = {key: config.get(key, False) for key in ("use_rslora", "use_dora")}
        for key, flag in flags.items():
            if not isinstance(flag, bool):
                raise AdapterFileError("not a boolean", where=where, got=f"{key}={flag!r}", expected="true or false")
        alpha = config.get("lora_alpha", 8)
        if alpha is None:
            raise AdapterFileError("not a number", where=where, got="lora_alpha=None", expected="a number")
        return {
            "r": config.get("r", 8),
            "alpha": alpha,
            "target_parameters": config.get("target_parameters") or (),
            "rank_pattern": config.get("rank_pattern") or {},
            "alpha_pattern": config.get("alpha_pattern") or {},
            "trainable_tokens": config.get("trainable_token_indices") or (),
            "dropout": config.get("lora_dropout", 0.0),
            "bias": config.get("bias", "none"),
            "scaling": "rslora" if flags["use_rslora"] else "standard",
            "start": _start(config.get("init_lora_weights", True), where),
        }

    def targets(self, tensors: Tensors) -> dict[str, Mapping[str, Tensor]]:
        return {
            path: slots
            for path, slots in tensors.items()
            if not OWN.isdisjoint(slots) or any(slot.endswith((".lora_A", ".lora_B")) for slot in slots)
        }

    def check_module(self, path: str, slots: Mapping[str, Tensor], spec: TargetedMethod, where: str) -> None:
        assert isinstance(spec, Factored)
        if not OWN.isdisjoint(slots):
            _check_slots(path, slots, spec, f"{where}: {path}")
            return
        for matrix in dict.fromkeys(slot.rpartition(".")[0] for slot in slots):
            inner, outer = (slots.get(f"{matrix}.{slot}") for slot in PAIRS[0])
            if inner is None or outer is None or not matrix:
                raise AdapterFileError("a factor is missing", where=f"{where}: {path}", got=", ".join(slots))
            _check_rank(inner, outer, spec.rank_at(f"{path}.{matrix}"), f"{where}: {path}.{matrix}", True)

    def accounted(self, path: str, slots: Mapping[str, Tensor], spec: TargetedMethod) -> bool:
        if SLOT in slots:
            return len(slots) == 1 and tokens.counted(path, slots[SLOT], spec)
        return super().accounted(path, slots, spec) or (
            getattr(spec, "bias", "none") == "all" and set(slots) == {"bias"}
        )

    # Writing ---------------------------------------------------------------------------------------------------------

    def written(self, adapter: Adapter) -> tuple[TargetedMethod, Tensors]:
        """A start made of the weight is written as the plain adapter of twice the rank that computes the same."""
        spec, tensors = adapter.spec, adapter.tensors
        assert isinstance(spec, Factored)
        if spec.start in PLAIN_STARTS:
            return spec, tensors
        doubled = plain_spec(spec)
        fields = {name: getattr(doubled, name) for name in type(doubled).model_fields}
        return type(spec)(**fields), {path: _doubled(path, slots) for path, slots in tensors.items()}

    def restored(self, spec: TargetedMethod, tensors: Tensors) -> Tensors:
        assert isinstance(spec, Factored)
        if spec.start in PLAIN_STARTS:
            return tensors
        return {path: _halved(slots, spec.rank_at(path)) for path, slots in tensors.items()}

    def name(self, path: str, slot: str, spec: TargetedMethod, slots: Mapping[str, Tensor]) -> str:
        if slot in _ENDING_OF:
            return f"{PREFIX}{path}{_ENDING_OF[slot]}"
        matrix, _, factor = slot.rpartition(".")
        if matrix:
            return f"{PREFIX}{path}{stacked.nesting(matrix, slots, path)}{_ENDING_OF[factor]}"
        within = "" if OWN.isdisjoint(slots) else ".base_layer"
        return f"{PREFIX}{path}{within}.{slot}"

    def said(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        assert isinstance(spec, Factored)
        parameters = listed(spec.target_parameters)
        if self.resolved(spec, tensors):
            parameters = stacked.parameters_in(tensors)
        only_parameters = bool(parameters) and not self.named_targets(tensors)
        return {
            "r": spec.r,
            "lora_alpha": plain_number(spec.alpha),
            "target_parameters": parameters or None,
            "rank_pattern": dict(spec.rank_pattern),
            "alpha_pattern": {key: plain_number(value) for key, value in spec.alpha_pattern.items()},
            "trainable_token_indices": tokens.indices(spec, tensors),
            "lora_dropout": 0.0 if only_parameters else spec.dropout,  # PEFT refuses it, and here it does nothing
            "bias": spec.bias,
            "use_dora": spec.name == "dora",
            "use_rslora": spec.scaling == "rslora",
            "init_lora_weights": "gaussian" if spec.start == "gaussian" else True,
        }

    def named_targets(self, tensors: Tensors) -> list[str]:
        return [path for path, slots in self.targets(tensors).items() if not stacked.matrices(slots)]

    def resolved(self, spec: TargetedMethod, tensors: Tensors) -> bool:
        """PEFT applies no exclusions and layers to `target_parameters`, and knows stacked experts by no other name."""
        assert isinstance(spec, Factored)
        parameters = stacked.parameters_in(tensors)
        limited = bool(spec.exclude_modules) or spec.layers_to_transform is not None
        covered = all(any(f".{name}".endswith(f".{entry}") for entry in spec.target_parameters) for name in parameters)
        return bool(parameters and (limited or not covered)) or super().resolved(spec, tensors)


def _start(init: Any, where: str) -> str:
    if isinstance(init, bool):
        return "kaiming"
    if init == "gaussian":
        return "gaussian"
    if init in _UNCHANGED:
        return "kaiming"
    raise UnsupportedError(
        "this adapter's tensors are relative to a base that its initialisation changed",
        where=where,
        got=f"init_lora_weights={init!r}",
        hint="in PEFT, save it with path_initial_model_for_weight_conversion, which writes a plain LoRA",
    )


def _check_slots(path: str, slots: Mapping[str, Tensor], spec: Factored, where: str) -> None:
    """One pair of factors, DoRA's magnitude, and a bias where the spec trains biases."""
    pair = PAIRS[1] if "lora_embedding_A" in slots or "lora_embedding_B" in slots else PAIRS[0]
    required = {*pair, MAGNITUDE} if spec.name == "dora" else {*pair}
    missing = sorted(required - set(slots))
    if missing:
        meaning = "use_dora=True" if missing[0] == MAGNITUDE else "both factors"
        raise AdapterFileError(f"{missing[0]} is missing", where=where, got=", ".join(slots), expected=meaning)
    extra = sorted(set(slots) - required - ({"bias"} if spec.bias != "none" else set()))
    if extra:
        raise AdapterFileError("a tensor that the config does not account for", where=f"{where}.{extra[0]}")
    _check_rank(slots[pair[0]], slots[pair[1]], spec.rank_at(path), where, False)


def _check_rank(inner: Tensor, outer: Tensor, rank: int, where: str, several: bool) -> None:
    """A (rank, in, ...) and B (out, rank, ...); of stacked experts a multiple, of a grouped convolution's B a part."""
    fits = inner.ndim == outer.ndim >= 2 and outer.shape[1] > 0
    if several:
        fits = fits and inner.ndim == 2 and inner.shape[0] == outer.shape[1] and inner.shape[0] % rank == 0
    else:
        fits = fits and inner.shape[0] == rank and rank % outer.shape[1] == 0
        fits = fits and (outer.shape[1] == rank if inner.ndim == 2 else set(outer.shape[2:]) == {1})
    if not fits:
        raise AdapterFileError(
            "factors that do not have the rank the config gives",
            where=where,
            got=str((tuple(inner.shape), tuple(outer.shape))),
            expected=f"rank {rank}",
        )


def _doubled(path: str, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors with the constants of their start among them, in one dtype."""
    kinds = {
        str(tensor.dtype) for slot, tensor in slots.items() if slot.startswith("start_") or slot in PAIRS[0] + PAIRS[1]
    }
    if len(kinds) > 1:
        raise StateError(
            "factors and the constants of their start differ in dtype", where=path, got=", ".join(sorted(kinds))
        )
    own = {slot: tensor for slot, tensor in slots.items() if slot != MAGNITUDE}
    return plain_slots(own) | {slot: slots[slot] for slot in (MAGNITUDE,) if slot in slots}


def _halved(slots: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The trained factors, and the constants that a start subtracts; the inverse of `_doubled`."""
    halves = dict(slots)
    for first, second in PAIRS:
        if first in slots and second in slots:
            inner, outer = slots[first], slots[second]
            halves |= {first: inner[:rank], "start_A": inner[rank:]}
            halves |= {second: outer[:, :rank], "start_B": -outer[:, rank:]}
    return halves
