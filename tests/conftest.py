"""One compute thread for every test: a second one only waits for the machine's other work."""

import torch

torch.set_num_threads(1)
