"""Other servers, and a client that asks them all the same."""
