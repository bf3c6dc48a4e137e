"""What does it take to bring an adapter's module from rank 64 to 8, and how near to the optimum is it?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import gossamer as gs
from bench.common import Row, report

OUT, IN, BEFORE, AFTER = 4096, 4096, 64, 8


def measure() -> list[Row]:
    """One module through its factors, and through its whole matrix; the optimum is equal before anything is timed."""
    adapter = _adapter()
    whole = adapter.delta("layer.proj")
    values = _spectrum(adapter)
    best = (values[AFTER:].norm() / values.norm()).item()
    small = adapter.resize(AFTER)
    error = ((small.delta("layer.proj") - whole).double().norm() / whole.double().norm()).item()
    assert abs(error - best) <= 1e-4 * best, (error, best)
    assert abs(small.provenance["error"] - best) <= 1e-4 * best

    def through_the_matrix() -> None:
        left, sizes, right = torch.svd_lowrank(adapter.delta("layer.proj"), q=AFTER, niter=4)
        _ = left * sizes, right

    rows: list[Row] = []
    for name, call in {"factors (ours)": lambda: adapter.resize(AFTER), "whole matrix": through_the_matrix}.items():
        times = [_seconds(call) for _ in range(5)][1:]
        rows.append(
            {
                "through": name,
                "median ms": round(statistics.median(times) * 1e3, 2),
                "min..max": f"{min(times) * 1e3:.2f}..{max(times) * 1e3:.2f}",
                "largest allocation MB": round(_largest(call) / 1e6, 2),
                "error": f"{error:.6f}" if "ours" in name else "",
                "optimum": f"{best:.6f}",
            }
        )
    return rows


def _adapter() -> gs.Adapter:
    """Singular values that fall as a trained adapter's do."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(BEFORE, IN, generator=generator)
    outer = torch.randn(OUT, BEFORE, generator=generator) * 0.9 ** torch.arange(BEFORE)
    slots = {"lora_A": inner, "lora_B": outer}
    return gs.Adapter(gs.LoRA(r=BEFORE, target_modules=("layer.proj",)), {"layer.proj": slots})


def _spectrum(adapter: gs.Adapter) -> torch.Tensor:
    """Singular values from the Gram matrices in float64: those of B A squared are the eigenvalues of (A A^T)(B^T B)."""
    slots, spec = adapter.tensors["layer.proj"], adapter.spec
    assert isinstance(spec, gs.LoRA)
    inner, outer = slots["lora_A"].double(), slots["lora_B"].double()
    squares = torch.linalg.eigvals((inner @ inner.T) @ (outer.T @ outer)).real.clamp(min=0)
    return spec.scaling_at("layer.proj") * squares.sqrt().sort(descending=True).values


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _largest(call: Callable[[], object]) -> int:
    """Bytes of the largest allocation that one operation keeps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    return max(event.cpu_memory_usage for event in record.events() or ())


if __name__ == "__main__":
    report("resize", __doc__ or "", measure, f"{OUT} x {IN}, float32; rank {BEFORE} to {AFTER}; the matrix is 67 MB.")
