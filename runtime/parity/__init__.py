"""The parts of the parity audit; runtime/verify.py tells how they go together."""
