"""Decoding, with ever fewer rows, and in turns with an environment."""
