"""Fast paths of inner loops: Triton kernels and thin matrix products."""
