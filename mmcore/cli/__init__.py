"""The ``mmcore`` command: reads flags, environment and file, and hands over to the rooms that do the work."""
