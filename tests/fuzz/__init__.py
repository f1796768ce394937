"""Decoders fed with what nobody would send: ``python -m tests.fuzz TARGET``, guided by coverage (atheris).

A target is a function of bytes, and seeds: valid input and plain lies, made in code. It fails if a decoder raises anything
but this package's errors, allocates more than the input can be worth, or contradicts itself, NumPy or the stock safetensors
library. What was found becomes a test with the exact bytes. ``tests/test_fuzz.py`` runs the same targets for a moment,
without atheris, so that they stay alive.

``guard`` memory · ``replies`` of a server · ``values`` under a key · ``entries`` of streams · ``folders`` of a saved replay.
"""
