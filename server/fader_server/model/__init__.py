"""The device side: loads a base, keeps its KV cache and runs the steps the engine plans."""
