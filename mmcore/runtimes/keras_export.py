"""Writes a Keras model as a SavedModel: ``python -m mmcore.runtimes.keras_export MODEL FOLDER``.

A program of its own, so that the process that serves neither imports TensorFlow's Python package nor runs what a file
brings along. Exit code 1 with one line on stderr when the file cannot be read.
"""

from __future__ import annotations

import sys


def main(model: str, folder: str) -> int:
    """Read ``model``, a ``.keras`` or ``.h5`` file, and write the SavedModel to ``folder``."""
    import keras

    try:
        # Layers that hold pickled code are refused.
        keras.saving.load_model(model, compile=False, safe_mode=True).export(folder, verbose=False)
    except Exception as error:  # a damaged file can raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"{type(error).__name__}: {lines[0] if lines else ''}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
