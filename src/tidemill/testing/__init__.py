"""Contracts as checks that the author of a plug-in can run: ``testing.store`` and ``testing.engine``.

They need nothing but what they check. ``testing.strategies`` needs Hypothesis.
"""
