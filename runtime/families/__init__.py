"""The families that can be run. Each module offers the same two functions:

prefill_layers(chunk, x)     a chunk of a prompt through all layers, in PyTorch with Hugging Face's own operations
decode(model, state)         one token per row through all layers and the head, on the launchers
"""

from types import ModuleType

from runtime.families import gemma, gemma2, gemma3

FAMILIES: dict[str, ModuleType] = {"gemma": gemma, "gemma2": gemma2, "gemma3": gemma3}
