"""Weights of few bits in words of 32: checkpoints of compressed-tensors, format pack-quantized, written and read."""
