"""The parts of the parity audit; runtime/parity/verify.py tells how they go together."""
