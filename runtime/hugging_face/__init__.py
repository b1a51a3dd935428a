"""transformers' own model classes with this runtime's `generate`, on weights that both share."""
