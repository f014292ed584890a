"""`fader serve`: every setting of ServeConfig as a flag."""

import inspect
import os

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
    # The rest is imported now: settings are checked before torch takes its seconds.
    from fader_server.launch import run
    from fader_server.world import open_world

    run(settings, open_world, version=version())


_PARAMETERS = flags_of(config.settings())
serve.__signature__ = inspect.Signature(_PARAMETERS)  # pyright: ignore[reportFunctionMemberAccess]
serve.__annotations__ = {p.name: p.annotation for p in _PARAMETERS}
