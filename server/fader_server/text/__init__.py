"""Text to token ids and back: prompts, chats, streams, stop strings. Knows no torch and no HTTP."""
