"""How an answer's tokens are chosen from logits: a request's sampling options, and what they do."""
