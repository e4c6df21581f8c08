"""A server on this machine in the place of the network: what it answers, and what it was asked for."""

import contextlib
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer


@dataclass
class Answer:
    """body: bytes; kind: its content type; length: the Content-Length that is claimed, the body's unless it is said.

    moved_to: a path that the client is sent to instead.
    """

    body: bytes = b""
    kind: str = "application/octet-stream"
    length: int | None = None
    moved_to: str | None = None


LOGIN = Answer(b"<html>sign in</html>", "text/html; charset=utf-8")


@contextlib.contextmanager
def serving(answers):
    """(base address, list of the paths that were asked for); answers: {path: Answer}, 404 for any other path."""
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self._answer(with_body=True)

        def do_HEAD(self):
            self._answer(with_body=False)

        def _answer(self, with_body):
            answer = answers.get(self.path)
            if answer is None:
                return self.send_error(404)
            self.send_response(302 if answer.moved_to else 200)
            if answer.moved_to:
                self.send_header("Location", answer.moved_to)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
            self.end_headers()
            if with_body:
                self.wfile.write(answer.body)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
