"""One compute thread for every test: a second one only waits for the machine's other work."""

import gc

import torch

torch.set_num_threads(1)
gc.disable()  # until the tests are there: what is imported and collected stays to the end


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
