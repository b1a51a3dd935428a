"""How an answer's next token is chosen from its logits."""
