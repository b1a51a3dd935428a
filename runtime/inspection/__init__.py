"""A look inside a model, as data and as text."""
