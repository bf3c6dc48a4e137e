"""peft_type LORA: the files of LoRA, rsLoRA and DoRA."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.methods.doubled import FACTORS, doubled, halved
from gossamer.methods.factored import PAIRS, Factored
from gossamer.methods.peft import EXCLUDED, LAYERS, TARGETS, ConfigKey, PeftLayout, Stored, listed, token_rows
from gossamer.methods.tokens import SLOT

MAGNITUDE = "lora_magnitude_vector"
_STARTS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian"}
_STARTS |= dict.fromkeys(("eva", "mica", "orthogonal"), "kaiming")
"""PEFT's starts after which the base is what it was, so that the factors alone are the adapter."""


def lora_layout(*, dora: bool = False) -> PeftLayout:
    """Factors beside modules; experts' and attention's own matrices as PEFT's wrappers nest them."""
    return PeftLayout(
        "LORA",
        slots={
            "lora_A": ".lora_A.weight",
            "lora_B": ".lora_B.weight",
            "lora_embedding_A": ".lora_embedding_A",
            "lora_embedding_B": ".lora_embedding_B",
            MAGNITUDE: f".{MAGNITUDE}",
        },
        others=((SLOT, f".token_adapter.{SLOT}"), (MAGNITUDE, f".{MAGNITUDE}.weight")),
        keys={
            "r": ConfigKey(8, "r"),
            "lora_alpha": ConfigKey(8, "alpha", read=_alpha, write=lambda stored: _plain_number(stored.spec.alpha)),
            "target_parameters": ConfigKey(None, "target_parameters", write=lambda stored: _parameters(stored) or None),
            "rank_pattern": ConfigKey({}, "rank_pattern"),
            "alpha_pattern": ConfigKey({}, "alpha_pattern", write=_alphas),
            "trainable_token_indices": ConfigKey(None, "trainable_tokens", write=_token_indices),
            "lora_dropout": ConfigKey(0.0, "dropout", write=_dropout),
            "bias": ConfigKey("none", "bias"),
            "use_dora": ConfigKey(False),
            "use_rslora": ConfigKey(False, "scaling", {False: "standard", True: "rslora"}),
            "init_lora_weights": ConfigKey(True, "start", _STARTS, _start),
        },
        targeting=(*TARGETS, *EXCLUDED, *LAYERS),
        given={"use_dora": dora},
        assumed=("r", "lora_alpha"),
        descriptive={"fan_in_fan_out": False, "megatron_core": "megatron.core", "qalora_group_size": 16},
        inert={
            "corda_config": None,  # how a start is made; whether the file is relative to it, init_lora_weights says
            "eva_config": None,
            "loftq_config": {},
            "lora_ga_config": None,
            "velora_config": None,  # how activations are kept for the backward
        },
        refused={
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
        },
        factored=True,
        check=partial(_check, dora),
        encode=doubled,
        decode=halved,
    )


# The config's keys ----------------------------------------------------------------------------------------------------


def _alpha(value: Any, where: str) -> Any:
    if value is None:
        raise AdapterFileError("not a number", where=where, got="lora_alpha=None", expected="a number")
    return value


def _start(value: Any, where: str) -> str:
    if isinstance(value, bool | str) and value in _STARTS:
        return _STARTS[value]
    raise UnsupportedError(
        "this adapter's tensors are relative to a base that its initialisation changed",
        where=where,
        got=f"init_lora_weights={value!r}",
        hint="in PEFT, save it with path_initial_model_for_weight_conversion, which writes a plain LoRA",
    )


def _parameters(stored: Stored) -> list[str]:
    return [*(stored.parameters if stored.resolved else stored.spec.target_parameters)]


def _alphas(stored: Stored) -> dict[str, Any]:
    return {pattern: _plain_number(alpha) for pattern, alpha in stored.spec.alpha_pattern.items()}


def _plain_number(number: float) -> float | int:
    """A whole number as PEFT would write it."""
    return int(number) if float(number).is_integer() else number


def _token_indices(stored: Stored) -> Any:
    """A list for the input embedding, or whole paths, which PEFT's looser rule cannot mistake."""
    wanted = stored.spec.trainable_tokens
    if not isinstance(wanted, dict):
        return list(wanted) or None
    holders = [path for path, slots in stored.adapter.tensors.items() if SLOT in slots]
    return {path: listed(token_rows(path, wanted)) for path in holders} or None


def _dropout(stored: Stored) -> float:
    """PEFT refuses it at parameters, and here it does nothing there."""
    return 0.0 if _parameters(stored) and not stored.targets else stored.spec.dropout


# The tensors ----------------------------------------------------------------------------------------------------------


def _check(dora: bool, spec: Factored, path: str, slots: Mapping[str, Tensor], where: str) -> None:
    """One pair of factors, DoRA's magnitude, and a bias where the spec trains biases; or pairs of matrices."""
    if {*FACTORS, MAGNITUDE}.isdisjoint(slots):
        for matrix in dict.fromkeys(slot.rpartition(".")[0] for slot in slots):
            inner, outer = (slots.get(f"{matrix}.{slot}") for slot in PAIRS[0])
            if inner is None or outer is None or not matrix:
                raise AdapterFileError("a factor is missing", where=where, got=", ".join(slots))
            _check_rank(inner, outer, spec.rank_at(f"{path}.{matrix}"), f"{where}.{matrix}", True)
        return
    pair = PAIRS["lora_embedding_A" in slots or "lora_embedding_B" in slots]
    required = {*pair, MAGNITUDE} if dora else {*pair}
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
