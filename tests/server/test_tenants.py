"""The tenants' file: what it means, and that no refusal tells a key."""

import hashlib
import os
from pathlib import Path

import pytest

from fader_server.cli import main
from fader_server.config import ServeConfig
from fader_server.errors import ConfigInvalid
from fader_server.tenants import MAX_BYTES, Tenant, read_tenants, tenants_of

SECRET = "sk-hunter2"
HASHED = "sha256:" + hashlib.sha256(SECRET.encode()).hexdigest()
KEYS = f'keys = ["{SECRET}"]\n'
FIELDS = (
    "keys, adapters, weight, max_share, max_waiting, requests_per_minute, tokens_per_minute, "
    "max_tokens"
)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tenants.toml"


def test_every_field_is_read_and_all_but_keys_have_defaults(file):
    file.write_text(
        f'[acme]\nkeys = ["one", "{HASHED}"]\nadapters = ["acme-*", "shared"]\n'
        "weight = 2\nmax_share = 0.5\nmax_waiting = 64\n"
        "requests_per_minute = 7\ntokens_per_minute = 900\nmax_tokens = 40\n"
        '["b.c"]\nkeys = ["two"]\n'
    )
    acme, other = read_tenants(file)
    assert acme == Tenant(
        "acme", (digest("one"), digest(SECRET)), ("acme-*", "shared"), 2.0, 0.5, 64, 7, 900, 40
    )
    assert other == Tenant("b.c", (digest("two"),), ("*",), 1.0, 1.0, None, None, None)


def test_upper_case_digits_are_the_same_key(file):
    file.write_text(f'[a]\nkeys = ["sha256:{HASHED.removeprefix("sha256:").upper()}"]')
    assert read_tenants(file)[0].keys == (digest(SECRET),)


@pytest.mark.parametrize(
    ("globs", "seen", "hidden"),
    [
        (("*",), "tone org/tone Tone", ""),
        (("tone",), "tone", "Tone tone2 org/tone"),
        (("acme-*", "b?"), "acme- acme-1 b1", "acme b b12 ACME-1"),
        (("org/*",), "org/a", "org org2/a a/org/b"),
        (("a[0-9]", "x[!y]"), "a0 xz", "aa xy"),
    ],
)
def test_globs_match_whole_names_in_their_case(globs, seen, hidden):
    tenant = Tenant("t", (), globs)
    assert all(tenant.sees(name) for name in seen.split())
    assert not any(tenant.sees(name) for name in hidden.split())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no tenant"),
        ("[a", "not TOML: look at end of document"),
        (f'[a]\n{KEYS}x = "{SECRET}', "not TOML: look at"),
        (f'"{SECRET}" = 1\n"{SECRET}" = 2\n', "not TOML: look at line 2, "),
        ("a = " + "[" * 100_000, "not TOML: nested too deep"),
        ("a = " + "1" * 10_000, "not TOML: look at a number with too many digits"),
        (f'"{SECRET}" = "acme"', "entry 1 is no table; write a tenant as [name]"),
        (f"[a]\n{KEYS}[[b]]", "entry 2 is no table"),
        (f'["{SECRET}/x"]\n{KEYS}', "tenant 1: expected a name of letters"),
        (f'["é"]\n{KEYS}', "tenant 1: expected a name of letters"),
        (f'["key:1"]\n{KEYS}', "tenant 1: expected a name of letters, digits and . _ -"),
        ("[a]", "tenant a: keys: expected a list of keys"),
        ("[a]\nkeys = []", "tenant a: keys: expected a list that is not empty"),
        (f'[a]\nkeys = "{SECRET}"', "tenant a: keys: expected a list"),
        (f'[a]\nkeys = ["x", "{SECRET} "]', "tenant a: keys: item 2: expected a key of 1 to 512"),
        ("[a]\nkeys = [1]", "keys: item 1: expected a key"),
        ('[a]\nkeys = [""]', "keys: item 1: expected a key"),
        (f'[a]\nkeys = ["sha256:{SECRET}"]', "item 1: expected sha256: and 64 hexadecimal digits"),
        (f'[a]\nkeys = ["{SECRET}", "{HASHED}"]', "tenant a: keys: item 2 stands there twice"),
        (f"[a]\n{KEYS}[b]\n{KEYS}", "tenant b: keys: tenant a has item 1 too"),
        ('[a]\nkeys = ["x", "user"]', "tenant a: keys: --api-key or --admin-key has item 2 too"),
        ('[a]\nkeys = ["admin"]', "tenant a: keys: --api-key or --admin-key has item 1 too"),
        (f"[a]\n{KEYS}adapters = []", "tenant a: adapters: expected a list that is not empty"),
        (f'[a]\n{KEYS}adapters = "*"', "tenant a: adapters: expected a list"),
        (f'[a]\n{KEYS}adapters = ["*", "x@0123456789ab"]', "adapters: item 2: expected a name"),
        (f'[a]\n{KEYS}adapters = [""]', "adapters: item 1: expected a name"),
        (f"[a]\n{KEYS}adapters = [true]", "adapters: item 1: expected a name"),
        (f"[a]\n{KEYS}weight = true", "tenant a: weight: expected a number"),
        (f'[a]\n{KEYS}weight = "1"', "tenant a: weight: expected a number"),
        (f"[a]\n{KEYS}weight = 0", "tenant a: weight: expected a number from 0.001 to 1000"),
        (f"[a]\n{KEYS}weight = -1", "weight: expected a number from 0.001 to 1000"),
        (f"[a]\n{KEYS}weight = inf", "weight: expected a number from 0.001 to 1000"),
        (f"[a]\n{KEYS}weight = nan", "weight: expected a number from 0.001 to 1000"),
        (f"[a]\n{KEYS}weight = 1{'0' * 400}", "weight: expected a number from 0.001 to 1000"),
        (f"[a]\n{KEYS}max_share = 0", "tenant a: max_share: expected a number above 0, 1 at most"),
        (f"[a]\n{KEYS}max_share = 1.01", "max_share: expected a number above 0, 1 at most"),
        (f"[a]\n{KEYS}max_share = nan", "max_share: expected a number above 0, 1 at most"),
        (f"[a]\n{KEYS}max_waiting = 0", "tenant a: max_waiting: expected a whole number from 1"),
        (f"[a]\n{KEYS}max_waiting = 1.0", "max_waiting: expected a whole number from 1"),
        (f"[a]\n{KEYS}max_waiting = true", "max_waiting: expected a whole number from 1"),
        (f"[a]\n{KEYS}wieght = 1", "tenant a: unknown field wieght; did you mean weight?"),
        (f"[a]\n{KEYS}x = 1", f"tenant a: has an unknown field; it takes {FIELDS}"),
        (f"[a]\n{KEYS}{SECRET} = 1", "tenant a: has an unknown field"),
        (f"[a.b]\n{KEYS}", 'tenant a: has a table within; quote a name with dots in it: ["a.b"]'),
    ],
)
def test_what_is_wrong_is_told_in_one_line_without_a_key(file, text, told):
    file.write_text(text)
    with pytest.raises(ConfigInvalid) as refused:
        read_tenants(file, taken=("user", "admin"))
    message = str(refused.value)
    assert message.startswith(f"--tenants {file}: ")
    assert told in message
    assert "\n" not in message
    assert "hunter2" not in message
    assert HASHED.removeprefix("sha256:") not in message
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("raw", "told"),
    [(b"#" * (MAX_BYTES + 1), "at most 1048576 bytes"), (b"\xff", "expected UTF-8")],
)
def test_files_that_are_no_text_of_this_size(file, raw, told):
    file.write_bytes(raw)
    with pytest.raises(ConfigInvalid, match=told):
        read_tenants(file)


def test_what_cannot_be_read(tmp_path):
    for path, told in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigInvalid, match=told) as refused:
            read_tenants(path)
        assert str(path) in str(refused.value)


def test_what_is_no_regular_file_is_refused_without_a_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(ConfigInvalid, match="not a regular file"):
            read_tenants(path)


def test_a_file_may_be_a_symlink_as_mounted_secrets_are(file, tmp_path):
    file.write_text(f"[a]\n{KEYS}")
    (tmp_path / "link").symlink_to(file)
    assert read_tenants(tmp_path / "link")[0].name == "a"


def test_a_file_of_the_largest_size_is_read(file):
    text = f"[a]\n{KEYS}"
    file.write_text(text + "#" * (MAX_BYTES - len(text)))
    assert read_tenants(file)[0].name == "a"


def test_keys_of_the_settings_are_taken(file):
    file.write_text(f"[a]\n{KEYS}")
    assert tenants_of(ServeConfig()) == ()
    assert len(tenants_of(ServeConfig(tenants=file, api_key=("x",), admin_key="y"))) == 1
    for changes in ({"api_key": ("x", SECRET)}, {"admin_key": SECRET}):
        with pytest.raises(ConfigInvalid, match="has item 1 too"):
            tenants_of(ServeConfig(tenants=file, **changes))


def test_neither_a_key_nor_its_digest_is_in_a_repr(file):
    file.write_text(f"[a]\n{KEYS}")
    told = repr(read_tenants(file))
    assert "hunter2" not in told
    assert repr(digest(SECRET)) not in told
    assert "keys" not in told


def test_a_tenants_file_is_a_key_for_the_bind():
    file = Path("tenants.toml")
    for host in ("0.0.0.0", "127.0.0.1"):
        config = ServeConfig(host=host, tenants=file)
        assert not config.user_open
        assert not config.admin_open
    assert not ServeConfig(host="0.0.0.0", tenants=file, insecure=True).user_open
    with pytest.raises(ConfigInvalid, match="--tenants"):
        ServeConfig(host="0.0.0.0")


def test_a_bad_file_ends_the_start_with_exit_code_2(file, capsys):
    file.write_text(f"[a]\n{KEYS}weight = 0")
    assert main(["serve", "--tenants", str(file), "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"fader: --tenants {file}: tenant a: weight: ")
    assert told.count("\n") == 1
    assert "hunter2" not in told
