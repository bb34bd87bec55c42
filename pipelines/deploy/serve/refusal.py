"""What a client is told when it asked for what cannot be answered: always a 4xx, in one line."""

from collections.abc import Mapping


class Refusal(Exception):  # noqa: N818  no error of ours
    """An answer in itself: its status, one line, and headers beside."""

    def __init__(self, status: int, line: str, headers: Mapping[str, str] | None = None) -> None:
        # It may quote what was asked: not all of it.
        self.line = " ".join(line.split())[:300]
        super().__init__(self.line)
        self.status, self.headers = status, dict(headers or {})
