"""The OpenAI-compatible data plane: its own process, bytes in and bytes out, nothing asked of a database."""
