"""LoRA adapters as data: parse, store, place and apply them. Knows nothing of HTTP, tokens or scheduling."""
