"""Kernels that are timed on a GPU before the project takes one of them over."""
