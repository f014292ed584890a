"""HTTP: OpenAI's routes, Fader's own, and vLLM's for adapters. Knows nothing about tensors."""
