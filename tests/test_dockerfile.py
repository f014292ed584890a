"""What the container image promises, read from the Dockerfile: no Docker needed."""

import json
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of the last stage, lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found: list[tuple[str, str]] = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            found = []
        found.append((word, rest.strip()))
    return found


def last(found: list[tuple[str, str]], word: str) -> str:
    return [rest for instruction, rest in found if instruction == word][-1]


def check(text: str) -> None:
    found = instructions(text)
    assert last(found, "USER") not in ("root", "0", "0:0")
    check_command = last(found, "HEALTHCHECK").partition("CMD ")[2]
    program, flag, code = json.loads(check_command)
    assert (program, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert "/health" in code
    assert "8000" in last(found, "EXPOSE").split()
    assert json.loads(last(found, "ENTRYPOINT")) == ["fader"]
    command = json.loads(last(found, "CMD"))
    assert command[0] == "serve"
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert "/models" in json.loads(last(found, "VOLUME"))
    order = [word for word, _ in found]
    assert order.index("USER") > max(i for i, word in enumerate(order) if word == "RUN")


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_image_runs_unprivileged_checked_and_bound():
    check(dockerfile())


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("USER fader", "USER root"),
        ("/health'", "/elsewhere'"),
        ('"0.0.0.0"', '"127.0.0.1"'),
        ("EXPOSE 8000", "EXPOSE 80"),
        ('ENTRYPOINT ["fader"]', 'ENTRYPOINT ["bash"]'),
    ],
)
def test_image_that_breaks_a_promise_is_noticed(good, bad):
    assert good in dockerfile()
    with pytest.raises(AssertionError):
        check(dockerfile().replace(good, bad))


def test_image_holds_no_key():
    for word, rest in instructions(dockerfile()):
        assert word != "ENV" or "_KEY" not in rest


def test_run_instructions_are_shell_words():
    for word, rest in instructions(dockerfile()):
        if word == "RUN":
            assert shlex.split(rest)
