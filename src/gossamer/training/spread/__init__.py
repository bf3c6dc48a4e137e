"""One run on several processes: shares of the rows, shards of the base."""
