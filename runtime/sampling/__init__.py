"""How an answer's tokens are chosen from logits: the numbers of a request, and what is done by them."""
