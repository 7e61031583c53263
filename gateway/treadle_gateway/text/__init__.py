"""Text and tokens without torch: what the HTTP faces need of a base's tokenizer."""
