"""GGUF files read as checkpoints in Hugging Face's layout."""
