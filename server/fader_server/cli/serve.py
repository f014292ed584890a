"""`fader serve`: every setting of ServeConfig as a flag."""

import inspect
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from fader_server import config
from fader_server.cli.flags import flags_of
from fader_server.cli.version import version


def serve(**flags: object) -> None:
    """Serve a base and its adapters over OpenAI's API.

    Without MODEL: the bundled demo. Each flag may also be a FADER_ variable or a key of the
    --config file.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    settings = config.load(given, os.environ)
    with _terminable():
        # The rest is imported now: settings are checked before torch takes its seconds.
        from fader_server.launch import run
        from fader_server.world import open_world

        run(settings, open_world, version=version())


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a start, until the server has its own answer to it: a drain.

    Without a handler the kernel keeps the signal from a container's first process: the server would
    go on to start, and never know.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_PARAMETERS = flags_of(config.settings())
serve.__signature__ = inspect.Signature(_PARAMETERS)  # pyright: ignore[reportFunctionMemberAccess]
serve.__annotations__ = {p.name: p.annotation for p in _PARAMETERS}
