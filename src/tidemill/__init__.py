"""Tidemill: a self-hosted GPU cloud that decides first and then does.

The rooms and the direction of imports are described in ``docs/architecture.md``; the Python client is
``tidemill.sdk.Client``.
"""

__version__ = "0.1.0"
