"""Measurements of mmcore beside its peers: ``python -m bench [SUITE …] [--quick]`` (see README.md)."""
