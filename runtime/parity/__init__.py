"""The parity audit against Hugging Face; verify.py says how its files work together."""
