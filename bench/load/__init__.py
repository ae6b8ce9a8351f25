"""The load generator: a process of its own that calls one gRPC method, verifies every answer and times it."""
