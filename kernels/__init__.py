"""One file per operator: formula, reference, Triton kernels, gradient, registration."""
