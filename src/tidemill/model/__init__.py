"""Nouns: frozen values, checked at construction, free of I/O, clock and chance."""
