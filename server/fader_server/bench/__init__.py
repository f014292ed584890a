"""`fader bench`: load over HTTP against any OpenAI-style server. Knows nothing of the engine."""

from fader_server.bench.cli import bench_app

__all__ = ["bench_app"]
