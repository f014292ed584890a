import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from fader_server import config
from fader_server.cli import app, main


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "--port", "x"], "--port"),
        (["serve", "--host", "0.0.0.0"], "--api-key"),
        (["serve", "--arena", "many"], "--arena"),
        (["serve", "--adapter", "x"], "--adapter"),
        (["serve", "--no-such-flag"], "--no-such-flag"),
        (["nonsense"], "nonsense"),
        (["bench"], "Missing command"),
        (["serve", "--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments, named):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("fader: ")
    assert told.count("\n") == 1
    assert named in told


def test_no_arguments_show_the_help_and_are_no_mistake(capsys):
    assert main([]) == 0
    told = capsys.readouterr()
    assert "serve" in told.out
    assert told.err == ""


def test_environment_reaches_the_settings(capsys, monkeypatch):
    monkeypatch.setenv("FADER_DEVICE", "abacus")
    assert main(["serve"]) == 2
    assert "FADER_DEVICE" in capsys.readouterr().err


def test_every_setting_is_in_the_help():
    paths = os.pathsep.join(path for path in sys.path if path)
    told = subprocess.run(
        [sys.executable, "-m", "fader_server", "serve", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "80"},
        check=True,
    ).stdout
    assert max(map(len, told.splitlines())) <= 80
    told = " ".join(told.split())
    for setting in config.settings():
        spelled = setting.metavar if setting.positional else setting.flag
        assert spelled in told
    for shown in (
        "--device auto|cpu|cuda where the base lives (default: auto)",
        "--dtype auto|bfloat16|float16|float32 compute type (default: auto)",
        "--log-level debug|info|warning|error",
        "--merge-dtype nf4|bf16",
        "--adapter-cache SIZE disk for fetched adapters (default: 10GiB)",
        "--max-call-tokens N prompts times n times max_tokens (default: 1048576)",
        "seconds of made-up steps before the first request, 0: none (default: 2)",
        "--port N port to bind, 0: any free (default: 8000)",
    ):
        assert shown in told
    assert "(default: None)" not in told


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*path, name))


def test_no_list_of_commands_cuts_a_sentence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lists = [path for path, command in _commands(get_command(app)) if hasattr(command, "commands")]
    for path in lists:
        main([*path, "--help"])
        assert "..." not in capsys.readouterr().out.partition("Commands:")[2], path
    assert len(lists) == 4


def test_no_help_loses_a_word_in_brackets_to_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    bracketed = 0
    for path, command in _commands(get_command(app)):
        texts = [command.help, *(getattr(one, "help", None) for one in command.params)]
        words = [word for text in texts if text for word in text.split() if "[" in word]
        if words:
            assert main([*path, "--help"]) == 0
            told = capsys.readouterr().out
            for word in words:
                assert word in told, path
            bracketed += len(words)
    assert bracketed > 2


def test_a_busy_port_is_told_before_anything_is_loaded(capsys):
    from fader_server.config import ServeConfig
    from fader_server.errors import ConfigInvalid
    from fader_server.serving import bind

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigInvalid, match="--port"):
            bind(ServeConfig(port=taken.getsockname()[1]))
    with pytest.raises(ConfigInvalid, match="no-such-host"):
        bind(ServeConfig(host="no-such-host.invalid", insecure=True))


def test_a_timeout_longer_than_the_kernel_takes_is_no_fault():
    from fader_server.config import ServeConfig
    from fader_server.serving import bind

    bind(ServeConfig(port=0, stall_timeout=3e6)).close()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--version >&-", 0),
        ("nope 2>&-", 2),
        ("--version > /dev/full", 2),
        ("--version", 0),
    ],
)
def test_a_closed_or_full_output_is_no_traceback(command, code):
    program = f"{sys.executable} -c 'from fader_server.cli import main; raise SystemExit(main())'"
    done = subprocess.run(f"{program} {command}", shell=True, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("make room" in done.stderr) == ("full" in command)
