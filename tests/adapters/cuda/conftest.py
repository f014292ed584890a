"""Kernels run in Triton's interpreter here, unless the machine has a GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
