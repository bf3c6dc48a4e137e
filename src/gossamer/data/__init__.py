"""Data: from a file or rows in memory to batches whose loss masks are proven."""
