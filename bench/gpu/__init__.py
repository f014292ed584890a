"""What bench/gpu_suite.py runs: parity first, then figures, in sections that fail alone."""
