import dataclasses
import os
from pathlib import Path

import pytest

from fader_server.config import ClientConfig, ServeConfig, load, load_client, settings
from fader_server.definitions import settings_of
from fader_server.errors import ConfigInvalid
from fader_server.settings import AdapterSource, BlendTerm

EXAMPLES = {
    "merge": ("tone=0.7, domain=-0.2", (BlendTerm("tone", 0.7), BlendTerm("domain", -0.2))),
    "merge_dtype": ("bf16", "bf16"),
    "merge_share": ("0.7", 0.7),
    "probe": ("/texts/probe.txt", Path("/texts/probe.txt")),
    "adapter": ("a=b", AdapterSource("a", "b")),
    "adapter_dir": ("/x", Path("/x")),
    "adapter_hub": ("org/lora-*", "org/lora-*"),
    "adapter_url": ("s3://bucket/folder", "s3://bucket/folder/"),
    "cache_dir": ("/x", Path("/x")),
    "state_dir": ("/x", Path("/x")),
    "tenants": ("/x", Path("/x")),
    "device": ("cpu", "cpu"),
    "dtype": ("float32", "float32"),
    "log_level": ("error", "error"),
    "host": ("::1", "::1"),
    "allow_origin": ("https://app.example.com:8443", "https://app.example.com:8443"),
    "max_step_tokens": ("777", 777),
    "reasoning_format": ("none", "none"),
    "sampling_defaults": ("openai", "openai"),
    "default_chat_template_kwargs": ('{"enable_thinking": false}', {"enable_thinking": False}),
    "otlp_traces_endpoint": ("http://127.0.0.1:4318/v1/traces", "http://127.0.0.1:4318/v1/traces"),
}

BESIDE = {"protect_metrics": {"admin_key": "key"}}
"""What a setting needs of others."""


def example(setting) -> tuple[str, object]:
    if setting.name in EXAMPLES:
        return EXAMPLES[setting.name]
    if setting.switch:
        other = not getattr(ServeConfig(), setting.name)
        return str(other).lower(), other
    if setting.metavar == "SIZE":
        return "3MiB", 3 << 20
    return ("some-text", "some-text") if setting.metavar in ("MODEL", "NAME", "KEY") else ("7", 7)


@pytest.mark.parametrize("setting", list(settings()), ids=lambda setting: setting.name)
def test_each_setting_reads_the_same_from_flag_variable_and_file(setting, tmp_path):
    text, value = example(setting)
    expected = (value,) if setting.many else value
    file = tmp_path / "fader.toml"
    file.write_text(f"{setting.name.replace('_', '-')} = '{text}'")
    assert expected != getattr(ServeConfig(), setting.name)
    for flags, env in (
        ({setting.name: [text] if setting.many else text}, {}),
        ({}, {setting.variable: text}),
        ({"config": str(file)}, {}),
        ({}, {"FADER_CONFIG": str(file)}),
    ):
        flags = {**BESIDE.get(setting.name, {}), **flags}
        assert getattr(load(flags, env), setting.name) == expected


def test_flag_beats_variable_beats_file_beats_default(tmp_path):
    file = tmp_path / "fader.toml"
    file.write_text("port = 1\nmax-n = 2\nthreads = 3\nkv-cache = 4096\nstall_timeout = 1.5\n")
    config = load(
        {"config": str(file), "port": "5"}, {"FADER_PORT": "6", "FADER_MAX_N": "7", "HOME": "/"}
    )
    assert (config.port, config.max_n, config.threads) == (5, 7, 3)
    assert (config.kv_cache, config.stall_timeout, config.host) == (4096, 1.5, "127.0.0.1")


def test_variables_of_the_chat_template_may_be_a_table_of_the_file(tmp_path):
    file = tmp_path / "fader.toml"
    file.write_text("[default-chat-template-kwargs]\nenable_thinking = false\n")
    config = load({"config": str(file)}, {})
    assert config.default_chat_template_kwargs == {"enable_thinking": False}


def test_repeatable_settings_take_lists(tmp_path):
    file = tmp_path / "fader.toml"
    file.write_text('adapter = ["a=x", "b=y=z"]\n')
    config = load({"config": str(file)}, {"FADER_API_KEY": "one,two"})
    assert config.adapter == (AdapterSource("a", "x"), AdapterSource("b", "y=z"))
    assert config.api_key == ("one", "two")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5G", 3 << 29), ("1GB", 10**9), ("7", 7),
        ("1 kib", 1024),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert load({"arena": text}, {}).arena == size


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": "65536"}, "--port"),
        ({"port": "http"}, "--port"),
        ({"port": "1" * 5000}, "--port"),
        ({"arena": "0"}, "--arena"),
        ({"arena": "-1GiB"}, "--arena"),
        ({"arena": "1XiB"}, "--arena"),
        ({"device": "tpu"}, "--device"),
        ({"adapter": ["a"]}, "--adapter"),
        ({"adapter": ["../a=b"]}, "--adapter"),
        ({"adapter": ["a=b", "a=c"]}, "--adapter"),
        ({"threads": "0"}, "--threads"),
        ({"stall_timeout": "nan"}, "--stall-timeout"),
        ({"merge_seconds": "0"}, "--merge-seconds"),
        ({"api_key": ["a b"]}, "--api-key"),
        ({"api_key": [""]}, "--api-key"),
        ({"model": " "}, "MODEL"),
        ({"served_model_name": "a b"}, "--served-model-name"),
        ({"config": "/nowhere.toml"}, "--config"),
        ({"sampling_defaults": "vllm"}, "--sampling-defaults"),
        (
            {"default_chat_template_kwargs": "enable_thinking=false"},
            "--default-chat-template-kwargs",
        ),
        ({"default_chat_template_kwargs": "[1]"}, "--default-chat-template-kwargs"),
    ],
)
def test_wrong_values_are_named_in_one_line(flags, named):
    with pytest.raises(ConfigInvalid) as refused:
        load(flags, {})
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


CLIENT = {
    "url": ("https://host:1/x/v1/", "https://host:1/x"),
    "api_key": ("a", ("a",)),
    "admin_key": ("b", "b"),
    "timeout": ("2.5", 2.5),
}


@pytest.mark.parametrize("setting", list(settings_of(ClientConfig)), ids=lambda s: s.name)
def test_each_setting_of_a_client_reads_the_same_from_flag_variable_and_file(setting, tmp_path):
    text, value = CLIENT[setting.name]
    file = tmp_path / "fader.toml"
    file.write_text(
        f'port = 1\n{setting.name.replace("_", "-")} = "{text}"'
    )  # a server's beside it
    for flags, env in (
        ({setting.name: [text] if setting.many else text}, {}),
        ({}, {setting.variable: text}),
        ({"config": str(file)}, {}),
    ):
        assert getattr(load_client(flags, env), setting.name) == value
    assert load({"config": str(file)}, {}).port == 1


def test_a_client_uses_the_most_able_key_and_tells_none():
    both = load_client({}, {"FADER_API_KEY": "one,two", "FADER_ADMIN_KEY": "hunter2"})
    assert both.key == "hunter2"
    assert load_client({}, {"FADER_API_KEY": "one,two"}).key == "one"
    assert load_client({}, {}).key is None
    assert "hunter2" not in repr(both)


@pytest.mark.parametrize(
    "url", ["", "host:8000", "ftp://host", "http://", "http://a b", "http://a?b"]
)
def test_wrong_addresses_are_named(url):
    with pytest.raises(ConfigInvalid, match="--url"):
        load_client({"url": url}, {})


def test_a_secret_is_never_repeated():
    with pytest.raises(ConfigInvalid) as refused:
        load({"admin_key": "sec ret"}, {})
    assert "sec" not in str(refused.value)
    assert "hunter2" not in repr(load({"admin_key": "hunter2", "api_key": ["hunter2"]}, {}))


def test_misspelt_names_are_refused_with_a_hint(tmp_path):
    file = tmp_path / "fader.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ConfigInvalid, match="did you mean port"):
        load({"config": str(file)}, {})
    with pytest.raises(ConfigInvalid, match="FADER_API_KEY"):
        load({}, {"FADER_API_KEYS": "x"})
    load({}, {"FADER_SOMETHING_ELSE": "x"})
    file.write_text("port = [")
    with pytest.raises(ConfigInvalid, match="not TOML"):
        load({"config": str(file)}, {})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServeConfig().port = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "text", ["tone=", "tone=x", "=1", "tone,,domain", "", ",", "auto=1=2", "tone=0.7;domain"]
)
def test_a_malformed_blend_says_how_one_is_spelled(text):
    with pytest.raises(ConfigInvalid, match=r"--merge: expected NAME=WEIGHT"):
        load({"merge": text}, {})


def test_merge_takes_a_name_a_version_or_auto():
    assert load({"merge": "auto"}, {}).merge == "auto"
    assert load({"merge": "tone"}, {}).merge == (BlendTerm("tone", 1.0),)
    name = "org/tone@3fa9c1d2e4b5"
    assert load({"merge": f"{name}=-1"}, {}).merge == (BlendTerm(name, -1.0),)
    with pytest.raises(ConfigInvalid, match="--merge-share"):
        load({"merge": "auto", "merge_share": "1"}, {})


@pytest.mark.parametrize("kind", [ServeConfig, ClientConfig])
def test_no_number_is_without_bounds(kind):
    for setting in settings_of(kind):
        if setting.metavar == "N" and not setting.switch:
            with pytest.raises(ValueError, match=r"from .* to"):
                setting.parse("9" * 18)
            assert setting.parse("1") == 1


def test_more_threads_than_any_use_are_refused_and_those_of_the_cores_are_not():
    cores = os.cpu_count() or 1
    assert load({"threads": str(cores)}, {}).threads == cores
    most = max(64, 4 * cores)
    with pytest.raises(ConfigInvalid, match=f"--threads: expected a whole number from 1 to {most}"):
        load({"threads": str(most + 1)}, {})


def test_a_wrong_value_in_the_file_is_told_where_a_flag_or_a_variable_counts(tmp_path):
    file = tmp_path / "fader.toml"
    file.write_text('port = "many"')
    for flags, env in (({"port": "1"}, {}), ({}, {"FADER_PORT": "1"}), ({}, {})):
        with pytest.raises(ConfigInvalid, match=r"fader\.toml: port"):
            load({**flags, "config": str(file)}, env)
    file.write_text("port = 2")
    assert load({"port": "1", "config": str(file)}, {}).port == 1
