"""How to draw a spec of each registered method. A method without an entry here fails the laws."""

from __future__ import annotations

from hypothesis import strategies as st

from gossamer.methods import LoRA, TargetedMethod

SPECS: dict[str, st.SearchStrategy[TargetedMethod]] = {
    "lora": st.builds(
        LoRA,
        r=st.integers(1, 6),
        alpha=st.floats(0.5, 32, width=16),
        rank_pattern=st.sampled_from([{}, {r"layers\.0.*": 3}, {"^layers.1(.inner)*": 2}]),
        alpha_pattern=st.sampled_from([{}, {r"layers\.1.*": 4.0}]),
        scaling=st.sampled_from(["standard", "rslora"]),
        start=st.sampled_from(["gaussian", "kaiming"]),
        bias=st.sampled_from(["none", "all", "lora_only"]),
        modules_to_save=st.sampled_from([(), ("norm",)]),
    )
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
