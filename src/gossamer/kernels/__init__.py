"""Numbers: the functions that adapter layers compute with. No policy, no input or output."""
