"""weft weaves LoRA adapters, 4-bit weights and Triton kernels into a model that somebody else wrote."""
