"""One compute thread for every test: a second one only waits for the machine's other work."""

import gc
import logging
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # until the tests are there: what is imported and collected stays to the end


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Who sets logging up, as a server does, leaves no stream behind that ends with its test."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)
    root.setLevel(level)
