"""How many logits exist at a time in a loss: also what a plan counts with, so nothing here needs torch."""

CHUNK = 2**22
"""Logits that exist at once in the loss, or are turned to float32 at once."""

BLOCKS = 32
"""Into which the logits of the loss are cut at most: more would be too narrow for products, and go over what is summed
too often."""


def columns_at_once(labelled: int, vocabulary: int) -> int:
    """How many columns of the (labelled, vocabulary) logits the loss holds at a time, where there are so many."""
    return max(1, CHUNK // labelled, -(-vocabulary // BLOCKS))
