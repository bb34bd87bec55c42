"""A proxy before an S3 server that breaks what it is told to break, and remembers what was asked.

It takes one request from each connection, so that it sees every one of them. The client signs the
host that it knows, which stays in the request: so the server takes it.
"""

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n\r\n"
    b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
)


@dataclass(frozen=True)
class Fault:
    """What befalls a request: refused as too much; done, and its answer lost; or its answer cut, or
    held for good, after so many bytes of the body. Without a count a held request never reaches
    the server.
    """

    busy: bool = False
    lose: bool = False
    hold: bool = False
    after: int | None = None


@dataclass
class Request:
    """A request, and how many bytes of its answer's body went to the client."""

    method: str
    path: str
    head: str
    served: int = 0


@dataclass
class Proxy:
    """`rule` gives each request its fault, if any, and may do what it likes meanwhile. `disguise`
    is replaced in what the server says, and put back in what the client says.
    """

    upstream: tuple[str, int]
    endpoint: str = ""
    rule: Callable[[Request], Fault | None] = lambda _: None
    disguise: tuple[bytes, bytes] = (b"", b"")
    requests: list[Request] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def asked(self, method: str, part: str = "") -> list[Request]:
        """The requests of a method whose path holds `part`, in their order."""
        return [one for one in self.requests if one.method == method and part in one.path]

    def serve(self, client: socket.socket) -> None:
        head, rest = _head(client)
        if not head:
            return
        method, path, _ = head.decode("latin-1").split(" ", 2)
        request = Request(method, path, head.decode("latin-1"))
        self.requests.append(request)
        fault = self.rule(request) or Fault()
        if fault.busy:
            client.sendall(BUSY)
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 16):
                pass
        elif fault.hold and fault.after is None:
            self.over.wait()
        else:
            self._forward(client, head, rest, request, fault)

    def _forward(
        self, client: socket.socket, head: bytes, rest: bytes, request: Request, fault: Fault
    ) -> None:
        old, new = self.disguise
        with socket.create_connection(self.upstream) as server:
            said = head.replace(new, old) if new else head
            server.sendall(said[:-2] + b"Connection: close\r\n\r\n" + rest)
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            answer, body = _head(server)
            while answer.startswith(b"HTTP/1.1 100"):
                client.sendall(answer)
                answer, body = _head(server, body)
            if fault.lose:
                return
            client.sendall(answer.replace(old, new) if old else answer)
            while body := body or server.recv(1 << 16):
                body = body.replace(old, new) if old else body
                if fault.after is not None:
                    body = body[: fault.after - request.served]
                client.sendall(body)
                request.served += len(body)
                if request.served == fault.after:
                    break
                body = b""
            if fault.hold:
                self.over.wait()


def _head(connection: socket.socket, got: bytes = b"") -> tuple[bytes, bytes]:
    """The bytes until an empty line, and those that came with them."""
    while b"\r\n\r\n" not in got:
        if not (more := connection.recv(1 << 16)):
            return b"", b""
        got += more
    head, _, rest = got.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)


@contextmanager
def before(endpoint: str) -> Iterator[Proxy]:
    """A proxy before the server at `endpoint`, until the block ends."""
    parts = urlsplit(endpoint)
    proxy = Proxy((parts.hostname or "", parts.port or 80))

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # a client that was killed
                proxy.serve(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.over.set()
            server.shutdown()
