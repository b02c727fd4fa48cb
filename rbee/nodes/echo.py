"""Runs on a node for a moment, sent through SSH: a port there that sends back what it is sent.

It listens where SSH has reached the node, as hive and workers will, on the first free port of those
it is given. Standard library only.
"""

import json
import os
import socket
import sys
from typing import Any

PATIENCE = 5.0


def listen(ports: Any) -> Any:
    words = os.environ.get("SSH_CONNECTION", "").split()
    address = words[2] if len(words) == 4 else "127.0.0.1"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server((address, port), family=family)
        except OSError:
            if port == ports[-1]:
                raise
    raise ValueError("no port is given")


def answer(peer: Any) -> None:
    peer.settimeout(PATIENCE)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        data = peer.recv(64)
        while data:
            peer.sendall(data)
            data = peer.recv(64)
    except OSError:  # whoever asked is gone
        pass


def main() -> None:
    server = listen([int(word) for word in sys.argv[1:]])
    sys.stdout.write(json.dumps(server.getsockname()[:2]) + "\n")
    sys.stdout.flush()
    while True:
        peer, _ = server.accept()
        with peer:
            answer(peer)


if __name__ == "__main__":
    main()
