"""A Kubernetes API server for tests, with the rules of the real one that a controller can run into.

``python -m tests.apiserver --port N --tokens FILE [--without-cel]`` keeps objects in memory and serves them over plain
HTTP. What it has in common with the real one ``tests/integration/test_api_server_contract.py`` states, which runs on
both. The file of tokens has lines of TOKEN,USER,UID,"GROUPS".
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from aiohttp import web

from tests.apiserver.access import User
from tests.apiserver.server import ApiServer


def main() -> None:
    """Serve until ended by a signal."""
    parser = argparse.ArgumentParser(prog="tests.apiserver")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="as kube-apiserver's --token-auth-file")
    parser.add_argument("--without-cel", action="store_true", help="be a server that is too old for rules in CEL")
    args = parser.parse_args()
    with args.tokens.open(newline="") as file:
        users = {row[0]: User(row[1], tuple("".join(row[3:]).split(","))) for row in csv.reader(file) if row}
    server = ApiServer(users, cel_rules=not args.without_cel)
    web.run_app(server.app(), host="127.0.0.1", port=args.port, print=None, access_log=None, shutdown_timeout=0.5)


if __name__ == "__main__":
    main()
