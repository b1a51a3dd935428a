"""Checkpoint folders whose matrices are integers with scales: compressed-tensors, GPTQ, AWQ."""
