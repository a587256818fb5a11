"""Speed beside transformers."""
