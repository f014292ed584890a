"""What a server that reads folders only can do without."""

import subprocess
import sys

import pytest

HIDE = """
import builtins

own = builtins.__import__


def asked(name, globals=None, *rest, **named):
    if name == "httpx2" and (globals or {{}}).get("__name__", "").startswith("fader_"):
        raise ModuleNotFoundError(name)
    return own(name, globals, *rest, **named)


builtins.__import__ = asked
import {module}
"""
"""The Hub's library brings its own transport; ours must not ask for it."""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["fader_adapters.hub", "fader_server.model.checkpoint"])
def test_folders_are_read_without_the_hubs_transport(module: str) -> None:
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(module=module)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
