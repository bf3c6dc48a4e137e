"""Numbers of a few models typed in, so that a plan for them needs no file and no network."""

from __future__ import annotations

from gossamer.planning.shape import ModelShape

_LLAMA3 = 128_256
_SHAPES = (
    ModelShape("smollm2-135m", 30, 576, 9, 49_152, 1536, kv_heads=3, tied=True),
    ModelShape("llama-3.2-1b", 16, 2048, 32, _LLAMA3, 8192, kv_heads=8, tied=True),
    ModelShape("llama-3.2-3b", 28, 3072, 24, _LLAMA3, 8192, kv_heads=8, tied=True),
    ModelShape("llama-3.1-8b", 32, 4096, 32, _LLAMA3, 14_336, kv_heads=8),
    ModelShape("llama-3.1-70b", 80, 8192, 64, _LLAMA3, 28_672, kv_heads=8),
    ModelShape("llama-3.1-405b", 126, 16_384, 128, _LLAMA3, 53_248, kv_heads=8),
    ModelShape("llama-2-7b", 32, 4096, 32, 32_000, 11_008, dtype="float16"),
    ModelShape("llama-65b", 80, 8192, 64, 32_000, 22_016, dtype="float16"),
    ModelShape("gpt-3-175b", 96, 12_288, 96, 50_257, 4 * 12_288, gated=False, tied=True, dtype="float16"),
)  # fmt: skip
KNOWN = {shape.name: shape for shape in _SHAPES}
"""Name -> numbers."""


def known(name: str) -> ModelShape | None:
    """The model of that name, or of a hub id that means it: "meta-llama/Llama-3.1-8B-Instruct"."""
    short = name.rpartition("/")[2].lower().removeprefix("meta-").removesuffix("-hf").removesuffix("-instruct")
    return KNOWN.get({"gpt-3": "gpt-3-175b", "gpt3": "gpt-3-175b"}.get(short, short))
