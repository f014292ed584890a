"""How long a base's sequences may be, told by its config."""

import pytest
from transformers import DogeConfig, GPT2Config, LlamaConfig, MptConfig, Qwen2Config

from fader_server.model.rotary import longest

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_yarn_that_was_written_into_a_config_stretches_its_positions():
    config = Qwen2Config(max_position_embeddings=128, rope_scaling=YARN)
    assert longest(config, "base") == 512
    already = Qwen2Config(max_position_embeddings=1024, rope_scaling=YARN)
    assert longest(already, "base") == 1024


def test_a_config_that_has_another_name_for_its_positions_is_understood():
    assert longest(MptConfig(max_seq_len=300), "base") == 300
    assert longest(GPT2Config(n_positions=77), "base") == 77


def test_a_base_that_attends_to_a_choice_of_keys_ends_where_it_begins_to_choose(caplog):
    config = DogeConfig(max_position_embeddings=512, keep_window_size=48)
    assert longest(config, "base") == 48
    assert "end at 48 tokens, not 512" in caplog.text
    caplog.clear()
    never = DogeConfig(max_position_embeddings=512, keep_window_size=2048)
    assert longest(never, "base") == 512
    assert not caplog.text


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ],
)
def test_other_kinds_end_where_the_config_says(rope):
    config = LlamaConfig(max_position_embeddings=128, rope_scaling=rope)
    assert longest(config, "base") == 128
