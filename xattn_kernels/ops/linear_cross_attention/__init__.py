"""Linear cross-attention."""
