"""The buffers that all connections of one event loop share."""

class Part:
    def __init__(self, source: bytes | bytearray | memoryview) -> None: ...

class Buffers:
    def __init__(self) -> None: ...
