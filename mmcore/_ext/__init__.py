"""Compiled modules, built from ``ext/``; each has a hand-written ``.pyi`` beside it."""
