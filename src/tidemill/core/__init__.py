"""Verbs: pure decisions. The instant and every other input are arguments; nothing here reads a clock or a file."""
