"""A setting, defined once as a field: its flag, its FADER_ variable, its TOML key, its check.

Reads any such dataclass from the three. Knows no setting by name; the environment comes as a
mapping.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fader_server.errors import ConfigInvalid
from fader_server.settings import OneOf, spelled_size

PREFIX = "FADER_"
_Config = TypeVar("_Config")


@dataclass(frozen=True, slots=True)
class Setting:
    """How one field is spelled and read."""

    name: str
    help: str
    parse: Callable[[object], Any]
    """One value, text or TOML's; raises ValueError with what it wants."""
    many: bool
    positional: bool
    switch: bool
    metavar: str
    """What stands for a value in the help: a word, or all choices."""
    default: str = ""
    """As it would be given; "" where none is, or it is chosen at start."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


def define(
    default: object,
    help: str,
    *,
    parse: Callable[[object], Any],
    metavar: str = "",
    positional: bool = False,
    secret: bool = False,
) -> Any:  # noqa: ANN401 - stands for the field's own type
    """The default of a field that is a setting."""
    spelling = {"help": help, "parse": parse, "metavar": metavar, "positional": positional}
    return dataclasses.field(default=default, repr=not secret, metadata=spelling)


def settings_of(kind: type) -> Iterator[Setting]:
    """Every setting of a dataclass, in order."""
    for item in dataclasses.fields(kind):
        yield Setting(
            name=item.name,
            help=item.metadata["help"],
            parse=item.metadata["parse"],
            many=item.default == (),
            positional=item.metadata["positional"],
            switch=isinstance(item.default, bool),
            metavar=item.metadata["metavar"] or _choices(item.metadata["parse"]) or "N",
            default=_spelled(item.default, item.metadata["metavar"]),
        )


def _choices(parse: Callable[[object], Any]) -> str:
    return "|".join(parse.choices) if isinstance(parse, OneOf) else ""


def _spelled(default: object, metavar: str) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, int) and metavar == "SIZE":
        return spelled_size(default)
    if isinstance(default, float):
        return f"{default:g}"
    return str(default) if isinstance(default, int | str) else ""


def read(
    kind: type[_Config],
    flags: Mapping[str, object],
    env: Mapping[str, str],
    *,
    kinds: Sequence[type],
) -> _Config:
    """Join flags, FADER_ variables and the --config file, in this order of precedence.

    `flags` maps field names to given values only, a list for a repeatable one. A repeatable
    variable is comma-separated. `kinds`: all that share the variables and the file. Raises
    ConfigInvalid naming the setting as its source spells it.
    """
    path = flags.get("config") or env.get(PREFIX + "CONFIG")
    table = _read_toml(Path(str(path))) if path else {}
    known = {setting.name: setting for other in kinds for setting in settings_of(other)}
    _refuse_unknown(table, known)
    _refuse_misspelt_variables(env, known)
    values: dict[str, Any] = {}
    for setting in settings_of(kind):
        name = setting.name
        in_file = (
            _parse(setting, table[name], f"{path}: {name}") if name in table else None
        )  # wrong ones are told even where they do not count
        if flags.get(name) is not None:
            spelled = setting.metavar if setting.positional else setting.flag
            values[name] = _parse(setting, flags[name], spelled)
        elif env.get(setting.variable, "") != "":
            raw = env[setting.variable]
            values[name] = _parse(
                setting, raw.split(",") if setting.many else raw, setting.variable
            )
        elif name in table:
            values[name] = in_file
    return kind(**values)


def _parse(setting: Setting, raw: object, spelled: str) -> object:
    try:
        if setting.many:
            items = raw if isinstance(raw, list) else [raw]
            return tuple(setting.parse(item) for item in items)
        return setting.parse(raw)
    except ValueError as error:
        raise ConfigInvalid(f"{spelled}: {error}") from None


def _read_toml(path: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"--config {path}: {error.strerror or 'cannot be read'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"--config {path}: not TOML: {error}") from None
    return {key.replace("-", "_"): value for key, value in table.items()}


def _refuse_unknown(table: Mapping[str, object], known: Mapping[str, Setting]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigInvalid(f"--config: unknown setting {key}{hint}")


def _refuse_misspelt_variables(env: Mapping[str, str], known: Mapping[str, Setting]) -> None:
    variables = {setting.variable for setting in known.values()} | {PREFIX + "CONFIG"}
    for key in env:
        if not key.startswith(PREFIX) or key in variables:
            continue
        near = difflib.get_close_matches(key, variables, n=1, cutoff=0.9)
        if near:
            raise ConfigInvalid(f"unknown variable {key}; did you mean {near[0]}?")
