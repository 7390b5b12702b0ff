"""The shapes of answers and of bodies, for the OpenAPI document and for checking what is sent.

Answers are typed dictionaries: they are built as such and encoded at once. Instants end in ``_at_ns`` and are ns
since 1970, zero for "not yet"; money is micro-USD, energy mJ, carbon mg of CO2e, shares thousandths.
"""
