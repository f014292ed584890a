"""OpenAI's Responses API, without a store: a response is a chat in other words."""
