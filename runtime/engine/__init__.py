"""Who steps: prefill, decode, and what becomes of each token."""
