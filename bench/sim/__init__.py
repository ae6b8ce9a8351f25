"""Simulations: the parts of mmcore that decide, on made-up traces and clusters."""
