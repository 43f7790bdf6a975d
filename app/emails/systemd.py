import os
import socket
from contextlib import suppress


def notify(state: str) -> None:
    """Sends a state to systemd, if it started this process with Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # Do not retry if systemd does not listen now: a later notification would be outdated.
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(address)
        channel.sendall(state.encode())
