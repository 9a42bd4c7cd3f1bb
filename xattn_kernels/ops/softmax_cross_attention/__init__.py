"""Softmax cross-attention."""
