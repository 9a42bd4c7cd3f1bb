"""What is known of the CUDA kernels apart from running them."""
