"""For tests of and against this library: seeded toy models of every architecture, and a decoder without weights."""

from gossamer.testing.fake_decoder import FakeDecoder
from gossamer.testing.toys import tiny, tiny_inputs, tiny_tokenizer

__all__ = ["FakeDecoder", "tiny", "tiny_inputs", "tiny_tokenizer"]
