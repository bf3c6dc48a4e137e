"""Low-rank terms of another adapter in every row as two Triton kernels over stacked slots.

Nothing is laid beside rows: each looks up the slot of its adapter, so a switch changes one number a row, no shape, and
compiles nothing. Sums are float32, in an order that does not depend on who else is there.

Source: Chen et al. 2023, arXiv:2310.18547, section 4 (batched gather matrix-vector products).
"""

# pyright: basic
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# (Triton's language is compiled from the syntax tree: its values have no types in Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

_INNER, _SPLIT, _OUTER = 128, 1024, 256


def shrink(x: Tensor, inner: Tensor, slots: Tensor) -> Tensor:
    """`A[slot_n] x_n` of each row, in parts that are yet to be added up: (N, parts, R) float32.

    Args:
        x: (N, in), unit stride along its last dimension. inner: (slots, R, in), contiguous.
        slots: (N,) int32; below 0 for none.
    """
    rows, width = x.shape
    ranks, parts = inner.shape[1], triton.cdiv(width, _SPLIT)
    out = torch.zeros(rows, parts, ranks, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(ranks)
        _shrink[(rows, parts)](x, inner, slots, out, x.stride(0), width, ranks, RANKS=block, PIECE=_INNER, SPLIT=_SPLIT)
    return out


def expand_(out: Tensor, down: Tensor, outer: Tensor, slots: Tensor, start: int) -> None:
    """Add `B[slot_n] down_n` to each row of out (N, out), in place, for the ranks from `start` on.

    Args:
        down: as `shrink` gives it. outer: (slots, r, out), contiguous.
    """
    rows, width = out.shape
    ranks = outer.shape[1]
    if rows and ranks:
        grid, block = (rows, triton.cdiv(width, _OUTER)), triton.next_power_of_2(ranks)
        sizes = out.stride(0), width, down.shape[2], start, ranks
        _expand[grid](out, down, outer, slots, *sizes, PARTS=down.shape[1], RANKS=block, PIECE=_OUTER)


@triton.jit
def _shrink(x, inner, slots, out, stride, width, ranks, RANKS: tl.constexpr, PIECE: tl.constexpr, SPLIT: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        rank = tl.arange(0, RANKS)
        total = tl.zeros((RANKS,), dtype=tl.float32)
        for piece in range(SPLIT // PIECE):
            at = part * SPLIT + piece * PIECE + tl.arange(0, PIECE)
            value = tl.load(x + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
            there = (rank[:, None] < ranks) & (at[None, :] < width)
            place = inner + slot * ranks * width + rank[:, None] * width + at[None, :]
            factor = tl.load(place, mask=there, other=0.0).to(tl.float32)
            total += tl.sum(factor * value[None, :], 1)
        tl.store(out + (row * tl.num_programs(1) + part) * ranks + rank, total, mask=rank < ranks)


@triton.jit
def _expand(
    out, down, outer, slots, stride, width, all_ranks, start, ranks,
    PARTS: tl.constexpr, RANKS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        rank, at = tl.arange(0, RANKS), piece * PIECE + tl.arange(0, PIECE)
        inner = tl.zeros((RANKS,), dtype=tl.float32)
        for part in range(PARTS):
            place = down + (row * PARTS + part) * all_ranks + start + rank
            inner += tl.load(place, mask=rank < ranks, other=0.0)
        there = (rank[:, None] < ranks) & (at[None, :] < width)
        factor = tl.load(outer + slot * ranks * width + rank[:, None] * width + at[None, :], mask=there, other=0.0)
        term = tl.sum(factor.to(tl.float32) * inner[:, None], 0)
        before = tl.load(out + row * stride + at, mask=at < width, other=0.0)
        tl.store(out + row * stride + at, (before.to(tl.float32) + term).to(before.dtype), mask=at < width)
