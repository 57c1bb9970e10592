"""The program that looks a name up, in a process of its own because that blocks (see resolve.py).

    python resolve_child.py NAME  ->  {"addresses": ["192.0.2.1", ...]}

It is started by path and imports nothing of ours. What can't be found has no addresses.
"""

import json
import socket
import sys


def main() -> None:
    """Print the addresses of the first argument."""
    try:
        found = socket.getaddrinfo(sys.argv[1], None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    # An address with a zone is link-local, and is kept as one that will be refused.
    addresses = [str(sockaddr[0]).partition("%")[0] for *_, sockaddr in found]
    print(json.dumps({"addresses": list(dict.fromkeys(addresses))}))


if __name__ == "__main__":
    main()
