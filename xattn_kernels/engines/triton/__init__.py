"""What the Triton engine's operators share; imports Triton only when an operator runs on it."""
