"""`fader bench`: load over HTTP against any OpenAI-style server. Knows nothing of the engine."""
