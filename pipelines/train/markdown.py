"""Tables as people read them in Markdown."""

from collections.abc import Sequence


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Its lines; a cell may hold a bar."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(header), line(["---"] * len(header)), *map(line, lines)]
