"""The cross-attention block in training: projections, batch norms and linear attention."""
