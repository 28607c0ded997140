"""Rows with hidden facts, from which a model learns to use a long context."""
