"""The decode step on a CPU: kernels compiled by numba, the threads that share them, their cache on disk."""
