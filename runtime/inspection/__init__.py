"""The look inside a model: what is seen, and how it shows itself as text."""
