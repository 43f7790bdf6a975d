"""Tests which TLS servers the programs on the host trust."""

from __future__ import annotations

import pytest

CLIENT_AND_SERVER = """
import socket, ssl, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/root/{name}-server.pem")
listener = socket.create_server(("127.0.0.1", 0))
def serve():
    try:
        context.wrap_socket(listener.accept()[0], server_side=True).close()
    except OSError:
        pass
server = threading.Thread(target=serve, daemon=True)
server.start()
client = socket.create_connection(listener.getsockname(), 10)
try:
    ssl.create_default_context().wrap_socket(client, server_hostname="127.0.0.1")
    print("trusted")
except ssl.SSLCertVerificationError as error:
    print("refused:", error.verify_message)
# OpenSSL aborts if the interpreter exits while a thread uses it.
server.join(10)
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("listed", "trusted"), ("others", "trusted"), ("earlier", "refused: unable to get local issuer certificate")],
)
def test_authority_is_trusted_or_not(host, name, expected):
    with host.sudo():
        assert host.check_output("python3 -c %s", CLIENT_AND_SERVER.format(name=name)) == expected
