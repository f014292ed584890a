"""Without a GPU the kernels of this folder run in Triton's interpreter, in float32 on the CPU."""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Triton decides at its import which kind of function it makes; an earlier import was without.
    # Its library stays: what that is made of is there only once.
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        if not name.startswith("triton._C"):
            del sys.modules[name]
