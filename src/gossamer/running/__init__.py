"""Running a model: packed rows, fused blocks, cached and recorded steps; each equals the model's own forward."""
