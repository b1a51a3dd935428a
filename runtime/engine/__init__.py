"""How a model is run: prefill, decode steps, their captured graphs, and what becomes of each token."""
