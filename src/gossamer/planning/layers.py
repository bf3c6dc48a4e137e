"""A decoder layer, its adapters and the head, written down as the operations they run.

This is transformers' code (5.x, fused attention) with this library's layers at its linear modules, or PEFT's with
`path="peft"`; what each operation keeps is said in `operations`.
"""

from __future__ import annotations

from gossamer.kernels.chunks import CHUNK, columns_at_once
from gossamer.planning import fused
from gossamer.planning import operations as op
from gossamer.planning.method import Tuning
from gossamer.planning.operations import WIDE, fresh
from gossamer.planning.setting import Setting
from gossamer.planning.shape import Linear, ModelShape
from gossamer.planning.tape import Profile, Tape, Value


class Layers:
    """The pieces of one model under one setting, each of which can be written onto a tape."""

    def __init__(self, shape: ModelShape, tuning: Tuning, setting: Setting) -> None:
        self.shape, self.tuning, self.setting = shape, tuning, setting
        self.rows, self.width = setting.tokens, setting.width
        self.full = tuning.name == "full"
        self.targets = {linear.role for linear in tuning.targets(shape)}
        self.tape = Tape()

    def decoder(self, *, first: bool = False, resident: bool = False) -> Profile:
        """One layer.

        Args:
            first: no gradient flows into its input, unless the embedding is trained.
            resident: its input is counted elsewhere, as with checkpointing.
        """
        self.tape, shape = Tape(), self.shape
        grad = self.full or not first
        x = self.tape.value(self.rows * shape.hidden, self.width, grad=grad, resident=resident)
        if self.fused:
            return self.tape.profile(self.block(x))
        normed = self.norm(x)
        attended = self.attention(normed)
        if shape.parallel:
            beside = self.mlp(self.norm(x) if shape.norms == 2 else normed)
            return self.tape.profile(op.add(self.tape, op.add(self.tape, beside, attended), x))
        x = op.add(self.tape, x, self.norm(attended) if shape.norms == 4 else attended)
        changed = self.mlp(self.norm(x))
        x = op.add(self.tape, x, self.norm(changed) if shape.norms == 4 else changed)
        return self.tape.profile(x)

    def top(self) -> Profile:
        """The last norm, the head at the labelled positions, and the loss."""
        self.tape, shape, labelled = Tape(), self.shape, self.setting.labelled
        x = self.tape.value(self.rows * shape.hidden, self.width, grad=True)
        x = self.norm(x)
        if self.setting.path == "gossamer":
            picked = fresh(labelled * shape.hidden, self.width)
            self.tape.record(picked, [(x, x.size)])
            x = picked
        loss = fresh(labelled, WIDE)
        if self.setting.path == "gossamer" and not self.full:
            return self.tape.profile(self.frozen_head(x, loss))
        head = self.weight(shape.vocabulary * shape.hidden)
        logits = op.matmul(self.tape, x, head, labelled, shape.vocabulary)
        if self.setting.path == "peft":
            wide = op.cast(self.tape, logits, WIDE)
            chances = op.unary(self.tape, wide, keeps_result=True)
            self.tape.record(loss, [(chances, chances.size)])
        else:
            chunk = min(labelled, max(1, CHUNK // shape.vocabulary)) * shape.vocabulary * WIDE
            copies = chunk if self.width == WIDE else 2 * chunk
            self.tape.record(loss, [(logits, logits.size)], [logits], scratch=copies, forward=copies)
        return self.tape.profile(loss)

    def frozen_head(self, hidden: Value, loss: Value) -> Value:
        """The loss whose gradient is formed on the way forward, some columns of logits at a time."""
        slope, labelled = op.like(hidden), self.setting.labelled
        columns = min(self.shape.vocabulary, columns_at_once(labelled, self.shape.vocabulary))
        narrow = self.width if self.width < WIDE else 0  # a second copy, for the products
        chunk = labelled * columns * (WIDE + narrow) + hidden.size  # the logits, and their part of the slope
        growing = hidden.elements * WIDE - slope.size
        self.tape.record(loss, [(hidden, hidden.size)], [slope], forward=hidden.size + chunk + growing)
        return loss

    # Parts of a layer ------------------------------------------------------------------------------------------

    def weight(self, elements: int) -> Value:
        """A parameter of the model as the layer uses it: frozen, or a trained float32 copy cast to the model's type."""
        if not self.full:
            return self.tape.parameter(elements, self.width, False)
        if self.setting.path == "peft":
            return self.tape.parameter(elements, self.width, True)
        return op.cast(self.tape, self.tape.parameter(elements, WIDE, True), self.width)

    def norm(self, x: Value, rows: int = 0, width: int = 0) -> Value:
        """The model's kind of norm; of whole rows, or of heads."""
        rows, width = rows or self.rows, width or self.shape.hidden
        if self.shape.norm == "layer":
            return op.layer_norm(self.tape, x, rows, self.weight(width), self.weight(width))
        return op.rms_norm(self.tape, x, rows, self.weight(width), offset=self.shape.norm == "offset")

    def attention(self, x: Value) -> Value:
        """Projections, rotation, fused attention, output."""
        shape, tape, rows = self.shape, self.tape, self.rows
        if shape.fused:
            sizes = (rows * shape.queries, rows * shape.keys, rows * shape.keys)
            q, k, v = op.split(tape, self.linear("qkv", x), sizes)
        else:
            q, k, v = (self.linear(role, x) for role in ("q", "k", "v"))
        if shape.family == "opt":
            q = op.scale(tape, q)
        if shape.head_norm:
            q = self.norm(q, rows * shape.heads, shape.head_dim)
            k = self.norm(k, rows * shape.kv_heads, shape.head_dim)
        if shape.rotary:
            angles = tape.value(2 * self.setting.sequence * shape.head_dim, self.width, resident=True)
            q, k = op.rotate(tape, q, angles, shape.rotary), op.rotate(tape, k, angles, shape.rotary)
        return self.linear("o", op.attention(tape, *self.seen(q, k, v)))

    def seen(self, q: Value, k: Value, v: Value) -> tuple[Value, Value, Value, int, int]:
        """What attention is given: where a mask is, each key and value once for every query head; sums; the mask."""
        mask = 0
        if self.setting.masked:
            times = self.shape.heads // self.shape.kv_heads
            k, v = op.repeat(self.tape, k, times), op.repeat(self.tape, v, times)
            mask = self.setting.batch * self.setting.sequence**2
        return q, k, v, self.rows * self.shape.heads, mask

    def mlp(self, x: Value) -> Value:
        """Two products and a non-linearity, or three and a gate; or the experts of each token."""
        shape, tape = self.shape, self.tape
        if shape.experts:
            return self.experts(x)
        if shape.fused_gate:
            size = self.rows * shape.intermediate
            gate, up = op.split(tape, self.linear("gate_up", x), (size, size))
            inner = op.multiply(tape, up, op.activation(tape, gate, shape.activation))
        elif shape.gated:
            gate = op.activation(tape, self.linear("gate", x), shape.activation)
            inner = op.multiply(tape, gate, self.linear("up", x))
        else:
            inner = op.activation(tape, self.linear("up", x), shape.activation)
        return self.linear("down", inner)

    def experts(self, x: Value) -> Value:
        """Each token's experts, all of one layer at once; the router's weights are frozen and its scores are not."""
        shape, tape = self.shape, self.tape
        rows, size = self.rows * shape.active, self.rows * shape.active * shape.intermediate
        scores = op.matmul(tape, x, self.weight(shape.experts * shape.hidden), self.rows, shape.experts)
        shares = op.unary(tape, op.cast(tape, scores, WIDE), keeps_result=True)
        routed = fresh(rows * shape.hidden, self.width)
        tape.record(routed, [(x, x.size)])
        both = op.matmul(
            tape, routed, self.weight(shape.experts * 2 * shape.hidden * shape.intermediate), rows, 2 * size // rows
        )
        gate, up = op.split(tape, both, (size, size))
        inner = op.multiply(tape, op.activation(tape, gate, shape.activation), up)
        out = op.matmul(tape, inner, self.weight(shape.experts * shape.hidden * shape.intermediate), rows, shape.hidden)
        weighed = op.multiply(tape, out, Value(rows, WIDE, shares.storage, shares.grad))
        gathered = fresh(self.rows * shape.hidden, self.width)
        tape.record(gathered, [(weighed, weighed.size)])
        return gathered

    # Linear modules --------------------------------------------------------------------------------------------

    def linear(self, role: str, x: Value) -> Value:
        """A linear module with what stands beside it."""
        linear = next(one for one in self.shape.linears if one.role == role)
        buffer = linear.weights * self.width if self.setting.quant else 0
        if role in self.targets and self.plain:
            return self.beside(linear, x, buffer)
        out = op.matmul(self.tape, x, self.weight(linear.weights), self.rows, linear.outer, buffer)
        if role not in self.targets:
            return out
        if self.tuning.name == "dora":
            return self.dora(linear, x, out)
        for _ in range(self.tuning.pairs):
            out = self.lora(linear, x, out)
        return out

    @property
    def plain(self) -> bool:
        """Whether a module and its factors are one function."""
        tuning = self.tuning
        return self.setting.path == "gossamer" and tuning.name == "lora" and not tuning.dropout and tuning.pairs == 1

    def beside(self, linear: Linear, x: Value, buffer: int) -> Value:
        """`W x + scaling * B A x` in one function, which keeps x and A x."""
        tape, rank = self.tape, self.tuning.r
        out, down = fresh(self.rows * linear.outer, x.width), fresh(self.rows * rank, x.width)
        factors = [
            tape.parameter(rank * size, self.setting.adapter_width, True) for size in (linear.inner, linear.outer)
        ]
        made = [(x, x.size), *((factor, factor.size) for factor in factors)]
        casts = 0 if self.setting.adapter_width == x.width else sum(factor.elements * x.width for factor in factors)
        tape.record(out, made, [x, down], scratch=max(buffer, 2 * down.size + casts), forward=max(buffer, casts))
        return out

    @property
    def fused(self) -> bool:
        """Whether the layer has a block of this library in its place."""
        shape = self.shape
        plain = shape.gated and not (shape.experts or shape.fused or shape.fused_gate or shape.parallel)
        known = shape.blocks and shape.family == "llama" and plain and shape.norms == 2 and shape.rotary == 1
        return self.setting.fused and self.plain and known and shape.activation in fused.ACTIVATIONS

    def block(self, x: Value) -> Value:
        """One layer of `models.blocks`: two functions, and attention between them."""
        shape, tape, rows = self.shape, self.tape, self.rows
        sizes = (rows * shape.queries, rows * shape.keys, rows * shape.keys)
        down, factors, buffer = self.terms("q", "k", "v")
        q, k, v = fused.normed_linears(tape, x, rows, sizes, down, factors, buffer)
        if shape.head_norm:
            q = self.norm(q, rows * shape.heads, shape.head_dim)
            k = self.norm(k, rows * shape.kv_heads, shape.head_dim)
        angles = tape.value(2 * self.setting.sequence * shape.head_dim, self.width, resident=True)
        q, k = fused.rotate(tape, q, angles), fused.rotate(tape, k, angles)
        attended = op.attention(tape, *self.seen(q, k, v))
        x = op.add(tape, x, self.linear("o", attended))
        (first, before, one), (last, after, other) = self.terms("gate", "up"), self.terms("down")
        inner = rows * shape.intermediate
        return fused.gated_mlp(tape, x, rows, inner, (first, last), [*before, *after], max(one, other))

    def terms(self, *roles: str) -> tuple[int, list[Value], int]:
        """Of modules that read one input: numbers of A x, the factors, and bytes of the largest rebuilt weight."""
        linears = [one for one in self.shape.linears if one.role in roles]
        adapted, rank = [one for one in linears if one.role in self.targets], self.tuning.r
        factors = [
            self.tape.parameter(rank * size, self.setting.adapter_width, True)
            for one in adapted
            for size in (one.inner, one.outer)
        ]
        buffer = max(one.weights for one in linears) * self.width if self.setting.quant else 0
        return self.rows * rank * len(adapted), factors, buffer

    def factor(self, elements: int, width: int) -> Value:
        """A or B, in the type that its product runs in."""
        return op.cast(self.tape, self.tape.parameter(elements, self.setting.adapter_width, True), width)

    def lora(self, linear: Linear, x: Value, out: Value) -> Value:
        """`out + scaling * B A x`. PEFT casts x to A's type and the sum back; here A and B are cast instead."""
        tape, rank = self.tape, self.tuning.r
        x = self.dropped(op.cast(tape, x, self.setting.adapter_width) if self.setting.path == "peft" else x)
        down = op.matmul(tape, x, self.factor(rank * linear.inner, x.width), self.rows, rank)
        up = op.matmul(tape, down, self.factor(rank * linear.outer, x.width), self.rows, linear.outer)
        term = op.scale(tape, up)
        if term.width == out.width:
            return op.add(tape, out, term)
        total = fresh(out.elements, term.width)
        tape.record(total, [(out, out.size), (term, None)])
        return op.cast(tape, total, out.width)

    def dora(self, linear: Linear, x: Value, out: Value) -> Value:
        """`ratio * (out + scaling * B A x)`, by this library's own function, which keeps the sum."""
        tape, rank = self.tape, self.tuning.r
        down = op.matmul(tape, self.dropped(x), self.factor(rank * linear.inner, x.width), self.rows, rank)
        outer, ratio = self.factor(rank * linear.outer, x.width), self.factor(linear.outer, x.width)
        whole, turned = op.like(out), op.like(out)
        made = [(out, out.size), (down, down.size), (outer, outer.size), (ratio, ratio.size)]
        widened = linear.weights * WIDE if self.width < WIDE else 0  # the norms are taken in float32
        tape.record(turned, made, [whole, down, outer, ratio], forward=max(whole.size, widened))
        return turned

    def dropped(self, x: Value) -> Value:
        """The input of A in training."""
        return op.dropout(self.tape, x) if self.tuning.dropout else x
