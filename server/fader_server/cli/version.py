"""Which Fader this is."""

from importlib import metadata


def version() -> str:
    """The installed distribution's version, "0" when run from a source tree."""
    try:
        return metadata.version("fader")
    except metadata.PackageNotFoundError:
        return "0"
