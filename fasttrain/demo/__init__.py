"""The demo: a small GPT over bytes, trained on the source of Python's own standard library."""
