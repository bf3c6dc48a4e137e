"""Those that `bench.training` compares: each trains the same adapter on the same batch, a step at a time."""
