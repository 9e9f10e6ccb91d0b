"""Stands for a Ray worker's interpreter: asks the server of `warm.py` for a process with everything imported.

    python -I -S warm_worker.py ADDRESS SCRIPT ARGUMENTS...

It lives as long as the worker, which holds the other end of the connection. Started for every worker, it must not
import anything but a few modules of the standard library.
"""

import json
import os
import socket
import sys


def main() -> int:
    """0 when the worker has ended. Without a server the script is run as it would be without this file."""
    address, *arguments = sys.argv[1:]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        try:
            server.connect(address)
        except OSError:
            os.execv(sys.executable, [sys.executable, *arguments])
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        server.shutdown(socket.SHUT_WR)
        server.recv(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
