"""Guardrails: kinds of them, and the window through which a text is looked at that comes in pieces."""
