"""From disk: where a model comes from, its files, its weights."""
