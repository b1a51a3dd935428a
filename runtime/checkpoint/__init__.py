"""Checkpoints: where they come from, their files, their weights."""
