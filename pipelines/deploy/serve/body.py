"""Bodies: read as they come, and no further than allowed, in bytes and in time."""

import asyncio
from collections.abc import Mapping

from starlette.requests import Request

from pipelines.deploy.serve.refusal import Refusal
from pipelines.params import Serve

# So many largest bodies may be half read at once, whatever the number of clients.
HALF_READ = 32


class Bodies:
    """Reads bodies, and knows how much of all of them is held."""

    def __init__(self, params: Serve) -> None:
        self.largest, self.seconds = params.max_body_bytes, params.read_seconds
        self.held = 0

    async def read(self, request: Request, headers: Mapping[bytes, bytes]) -> bytes:
        """The whole body. Raises Refusal: 408, 413, 415 or 429."""
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if (
            kind != b"application/json"
            or headers.get(b"content-encoding", b"identity") != b"identity"
        ):
            raise Refusal(415, "expected content-type application/json, not encoded")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.largest:
            raise self._too_large()
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self.seconds):
                await self._receive(request, parts)
        except TimeoutError:
            raise Refusal(
                408, f"the body did not come within {self.seconds} s", {"connection": "close"}
            ) from None
        finally:
            self.held -= sum(map(len, parts))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _receive(self, request: Request, parts: list[bytes]) -> None:
        size, more = 0, True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the client left before its body was whole")
            part, more = message.get("body", b""), message.get("more_body", False)
            parts.append(part)
            size += len(part)
            self.held += len(part)
            if size > self.largest:
                raise self._too_large()
            if self.held > HALF_READ * self.largest:
                raise Refusal(429, "too many bodies are half read", {"retry-after": "1"})

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is too large; at most {self.largest:,} bytes")
