"""What is on disk: atomic writes and the adapter folder."""
