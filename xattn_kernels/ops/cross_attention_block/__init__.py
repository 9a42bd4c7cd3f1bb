"""The cross-attention block: projections and linear attention."""
