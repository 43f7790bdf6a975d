"""An application that responds with the request that it received. It handles one request at a time."""

import json
import os
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.headers.get("Upgrade"):
            self.echo()
            return
        if self.path.startswith("/slow"):
            time.sleep(25)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen = {"path": self.path, "headers": dict(self.headers), "length": len(body), "server": self.server.name}
        self.send_response(401 if self.path.startswith("/other/refused") else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Application", "yes")
        self.end_headers()
        self.wfile.write(json.dumps(seen).encode())

    do_POST = do_GET

    def echo(self):
        head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        self.wfile.write(head.encode())
        self.wfile.write(self.rfile.read(5))


class UnixServer(socketserver.UnixStreamServer):
    name = "other"

    def get_request(self):
        connection, _ = super().get_request()
        return connection, ("unix", 0)


if __name__ == "__main__":
    path = "/run/example/other.sock"
    if os.path.exists(path):
        os.unlink(path)
    other = UnixServer(path, Handler)
    os.chmod(path, 0o666)  # noqa: S103 - nginx has a different user
    threading.Thread(target=other.serve_forever, daemon=True).start()
    server = HTTPServer(("127.0.0.1", 8000), Handler)
    server.name = "application"
    server.serve_forever()
