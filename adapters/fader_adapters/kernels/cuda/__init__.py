"""CUDA kernels in Triton. Importing this package imports neither Triton nor CUDA."""
