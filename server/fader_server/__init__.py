"""Fader's server: one NF4 base, many adapters and blends, OpenAI's API."""
