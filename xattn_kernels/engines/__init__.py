"""What engines share: native modules, Triton's runtime and kernels."""
