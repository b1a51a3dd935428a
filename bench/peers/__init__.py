"""The engines that `gemma-runtime bench compare` runs beside each other, each in a process of its own."""
