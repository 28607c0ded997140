"""The difference of two checkpoints: read tensor by tensor, decomposed, and what rounding adds."""
