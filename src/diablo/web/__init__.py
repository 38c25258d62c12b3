"""The HTTP side of a server: OpenAI's endpoints, adapters that come and go, metrics, logs and the chat page."""
