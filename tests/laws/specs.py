"""How to draw a spec of each registered method. A method without an entry here fails the laws."""

from __future__ import annotations

from hypothesis import strategies as st

from gossamer.methods import (
    IA3,
    BitFit,
    DoRA,
    FullTuning,
    Houlsby,
    Lin,
    LoRA,
    NormTuning,
    PrefixTuning,
    PromptTuning,
    TargetedMethod,
    VeRA,
)

_SAVED = st.sampled_from([(), ("norm",)])
_BIAS = st.sampled_from(["none", "all", "lora_only"])


def _decomposed(method: type[TargetedMethod]) -> st.SearchStrategy[TargetedMethod]:
    """Started from the weight: a rank that the narrowest weight has."""
    starts = st.sampled_from(["pissa", "pissa_fast", "olora"])
    return st.builds(method, r=st.integers(1, 2), start=starts, bias=_BIAS, modules_to_save=_SAVED)


def _bottleneck(method: type[TargetedMethod]) -> st.SearchStrategy[TargetedMethod]:
    return st.builds(
        method,
        target_modules=st.sampled_from(["all-linear", r"layers\.[01].*"]),
        bottleneck=st.integers(4, 8),
        activation=st.sampled_from(["gelu", "silu"]),  # four units of "relu" can all be dead
        modules_to_save=_SAVED,
    )


SPECS: dict[str, st.SearchStrategy[TargetedMethod]] = {
    "lora": st.builds(
        LoRA,
        r=st.integers(1, 6),
        alpha=st.floats(0.5, 32, width=16),
        rank_pattern=st.sampled_from([{}, {r"layers\.0.*": 3}, {"^layers.1(.inner)*": 2}]),
        alpha_pattern=st.sampled_from([{}, {r"layers\.1.*": 4.0}]),
        scaling=st.sampled_from(["standard", "rslora"]),
        start=st.sampled_from(["gaussian", "kaiming"]),
        bias=_BIAS,
        modules_to_save=_SAVED,
    )
    | _decomposed(LoRA),
    "dora": st.builds(
        DoRA,
        r=st.integers(1, 6),
        alpha=st.floats(0.5, 32, width=16),
        rank_pattern=st.sampled_from([{}, {r"layers\.0.*": 3}]),
        bias=_BIAS,
        modules_to_save=_SAVED,
    )
    | _decomposed(DoRA),
    "vera": st.builds(
        VeRA,
        target_modules=st.sampled_from(["all-linear", r"layers\.[01].*"]),
        layers_to_transform=st.sampled_from([None, 0]),
        r=st.integers(1, 6),
        d_initial=st.floats(0.0625, 1, width=16),
        projection_seed=st.integers(0, 9),
        modules_to_save=_SAVED,
    ),
    "ia3": st.builds(
        IA3,
        target_modules=st.sampled_from(["all-linear", r"layers\.[01].*"]),
        feedforward_modules=st.sampled_from(["auto", (), r"layers\.0.*"]),
        modules_to_save=_SAVED,
    ),
    "bitfit": st.builds(BitFit, target_modules=st.sampled_from(["auto", ("norm",)])),
    "norm": st.builds(NormTuning, target_modules=st.sampled_from(["auto", ("norm",)])),
    "houlsby": _bottleneck(Houlsby),
    "lin": _bottleneck(Lin),
    "prefix": st.builds(PrefixTuning, num_virtual_tokens=st.integers(1, 5), modules_to_save=_SAVED),
    "prompt": st.builds(
        PromptTuning,
        num_virtual_tokens=st.integers(1, 5),
        start=st.sampled_from(["vocabulary", "random"]),
        modules_to_save=_SAVED,
    ),
    "full": st.builds(
        FullTuning, exclude_modules=st.sampled_from([(), ("norm",)]), layers_to_transform=st.sampled_from([None, 0])
    ).filter(lambda spec: not (spec.exclude_modules and spec.layers_to_transform is not None)),
}
ADDABLE: dict[str, st.SearchStrategy[TargetedMethod]] = {
    "lora": st.builds(
        LoRA,
        r=st.integers(1, 6),
        alpha=st.floats(0.5, 32, width=16),
        scaling=st.sampled_from(["standard", "rslora"]),
        rank_pattern=st.sampled_from([{}, {r"layers\.0.*": 3}]),
    )
}
"""Those whose adapters have sums."""
REFUSE_TO_MERGE = frozenset({"houlsby", "lin", "prefix", "prompt"})
"""Those without an equivalent weight. Named here, so that a method that should merge cannot hide behind a refusal."""
MOVE_AT_THE_START = frozenset({"prefix", "prompt"})
"""Those that every token attends to from the beginning."""
ROOTED = MOVE_AT_THE_START
"""Those that stand at a whole decoder instead of at its modules."""
LOOSER = {"dora": 20.0}
"""Methods whose two ways to an output part further: DoRA's norm is a sum that may cancel, and the nets normalise."""
