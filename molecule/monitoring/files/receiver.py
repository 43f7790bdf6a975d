"""A webhook receiver: appends the body of each request to a file, one line per request."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with Path("/var/tmp/alerts.jsonl").open("ab") as file:  # noqa: S108 - a file of this test host
            file.write(body + b"\n")
        self.send_response(200)
        self.end_headers()


HTTPServer(("127.0.0.1", 9999), Receiver).serve_forever()
