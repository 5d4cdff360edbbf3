"""oneDNN's convolutions and pooling in JAX programs on CPU."""
