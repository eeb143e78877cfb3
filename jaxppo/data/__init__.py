"""Prompts and labelled texts, on the host: NumPy and the standard library only."""
