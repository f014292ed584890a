"""LoRA adapters as data: parse, store, place, apply. Knows nothing of HTTP or scheduling."""
