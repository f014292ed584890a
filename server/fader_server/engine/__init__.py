"""The engine: blocks, scheduler and the thread that owns the device. Never imports torch."""
