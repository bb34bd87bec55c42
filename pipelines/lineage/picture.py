"""The history of a bundle as a picture: stages from left to right, each a card of what it gave."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from pipelines.lineage import datasets
from pipelines.lineage.datasets import File
from pipelines.lineage.history import Given, Link

# In pixels. What goes further than to the next card runs in a lane below the cards.
MARGIN, TOP, GAP, LANE, ROUND = 32, 92, 52, 18, 9
CARD, COLUMN, HEAD, ROW, LINE, PAD = 216, 194, 36, 44, 17, 14
INK, MUTED, PAPER, RIM, STAGE, BUNDLE = (
    "#1f2933", "#75818e", "#ffffff", "#cbd4dc", "#0b5563", "#a8430c",
)  # fmt: skip
WIRES = ("#2a9d8f", "#c77d1e", "#6a5acd", "#b5475f", "#4f7d3a")
STYLE = """text { font: 12px Inter, "Segoe UI", Roboto, Helvetica, Arial, sans-serif }
text.small { font-size: 11px }
text.hash { font: 10.5px "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace }"""


def svg(links: Sequence[Link], digest: str) -> str:
    """`links` as `history.of` gives them, the last step first; `digest` names the bundle."""
    cards = [_Card(link) for link in reversed(links)]
    tallest, x = max(card.height for card in cards), MARGIN
    for card in cards:
        card.x, card.y = x, TOP + (tallest - card.height) // 2
        x += card.width + GAP
    makers = {given.path: at for at, card in enumerate(cards) for given in card.link.given}
    far = [
        path
        for at, card in enumerate(cards)
        for path in card.link.step.inputs
        if makers[path] < at - 1
    ]
    lanes = {path: TOP + tallest + LANE * at for at, path in enumerate(dict.fromkeys(far), 1)}
    wires = _wires(cards, makers, lanes)
    width, height = x - GAP + MARGIN, TOP + tallest + LANE * len(lanes) + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">',
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{height}" fill="#f4f7f9"/>',
            _text(MARGIN, 42, f"bundle {digest[:12]}", INK, size=22, weight=600),
            _text(MARGIN, 64, "and what it was made of: stages, what they gave, rows, MD5", MUTED),
            *wires,
            *(line for card in cards for line in card.drawn(last=card is cards[-1])),
            "</svg>\n",
        ]
    )


class _Card:
    """A stage, in the place that `svg` gives it."""

    def __init__(self, link: Link) -> None:
        self.link, self.x, self.y = link, 0, 0
        self.lists = [] if link.step.inputs else list(_lists(link.given))
        self.width = max(CARD, COLUMN * len(self.lists) + PAD)
        listed = LINE * (1 + max(len(files) for _, files in self.lists)) + PAD if self.lists else 0
        self.height = HEAD + ROW * len(link.given) + listed + PAD // 2

    def exit(self, path: str) -> tuple[int, int]:
        """Where the wire of an out begins."""
        row = [given.path for given in self.link.given].index(path)
        return self.x + self.width, self.y + HEAD + ROW * row + ROW // 2 + 2

    def drawn(self, last: bool) -> Iterator[str]:
        fill = BUNDLE if last else STAGE
        x, y, width = self.x, self.y, self.width
        yield _box(x, y, width, self.height, f'fill="{PAPER}" stroke="{fill if last else RIM}"')
        yield (
            f'<path d="M{x} {y + HEAD}V{y + ROUND}q0 {-ROUND} {ROUND} {-ROUND}h{width - 2 * ROUND}'
            f'q{ROUND} 0 {ROUND} {ROUND}V{y + HEAD}z" fill="{fill}"/>'
        )
        yield _text(x + PAD, y + 23, self.link.step.name, "#ffffff", size=14, weight=600)
        yield _text(x + width - PAD, y + 23, self.link.moment, "#dbe7ea", "small", end=True)
        for row, given in enumerate(self.link.given):
            top = y + HEAD + ROW * row
            yield _text(x + PAD, top + 20, _short(given.path), INK, weight=600)
            yield _text(x + PAD, top + 36, _said(given), MUTED, "small")
            yield _text(x + width - PAD, top + 36, given.md5[:8], MUTED, "hash", end=True)
        top = y + HEAD + ROW * len(self.link.given) + PAD
        for at, (table, files) in enumerate(self.lists):
            yield from _listing(x + PAD + COLUMN * at, top, table, files)


def _lists(given: Sequence[Given]) -> Iterator[tuple[str, list[File]]]:
    """The raw files, by name: each table of many, and all tables of one together."""
    tables = [table for one in given if one.content for table in datasets.tables(one.content)]
    for table in tables:
        if len(table.files) > 1:
            yield table.name, list(table.files)
    single = [
        File(table.name.rpartition("/")[2], table.md5, rows=table.rows)
        for table in tables
        if len(table.files) == 1
    ]
    if single:
        yield "tables of one file", single


def _listing(x: int, y: int, table: str, files: Sequence[File]) -> Iterator[str]:
    yield f'<path d="M{x} {y - 10}h{COLUMN - PAD}" stroke="{RIM}"/>'
    yield _text(x, y + 7, table, INK, "small")
    for at, file in enumerate(files, 1):
        line = y + 7 + LINE * at
        yield _text(x, line, file.path.removesuffix(".csv"), MUTED, "small")
        if file.rows is not None:
            yield _text(x + 110, line, f"{file.rows:,}", MUTED, "small", end=True)
        yield _text(x + 121, line, file.md5[:8], MUTED, "hash")


def _wires(
    cards: Sequence[_Card], makers: Mapping[str, int], lanes: Mapping[str, int]
) -> Iterator[str]:
    """From each out to the stages that read it, in a colour of its own."""
    for at, card in enumerate(cards):
        for port, path in enumerate(card.link.step.inputs):
            color = WIRES[list(makers).index(path) % len(WIRES)]
            x, y = cards[makers[path]].exit(path)
            if makers[path] == at - 1:
                end, half = card.y + HEAD // 2, (card.x + x) // 2
                line = f"M{x} {y}C{half} {y} {half} {end} {card.x - 7} {end}"
                tip = f"M{card.x} {end}l-9 -5v10z"
            else:
                down = x + 14 + 8 * list(lanes).index(path)
                low, up = lanes[path], card.x + 26 + 20 * port
                bottom = card.y + card.height
                line = (
                    f"M{x} {y}H{down - ROUND}q{ROUND} 0 {ROUND} {ROUND}V{low - ROUND}"
                    f"q0 {ROUND} {ROUND} {ROUND}H{up - ROUND}"
                    f"q{ROUND} 0 {ROUND} {-ROUND}V{bottom + 7}"
                )
                tip = f"M{up} {bottom}l-5 9h10z"
            yield f'<path d="{line}" fill="none" stroke="{color}" stroke-width="2"/>'
            yield f'<path d="{tip}" fill="{color}"/>'


def _said(given: Given) -> str:
    held = given.content
    if held is None:
        return "not on this disk"
    files = f"{len(held.files)} file{'s' if len(held.files) > 1 else ''}"
    return files if held.rows is None else f"{held.rows:,} rows · {files}"


def _short(path: str) -> str:
    return path if len(path) <= 30 else f"…{path[-29:]}"


def _box(x: int, y: int, width: int, height: int, style: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{ROUND}" {style}/>'


def _text(
    x: int,
    y: int,
    text: str,
    color: str,
    kind: str = "",
    end: bool = False,
    size: int = 0,
    weight: int = 400,
) -> str:
    style = f"font-weight:{weight}" + (f";font-size:{size}px" if size else "")
    anchor = ' text-anchor="end"' if end else ""
    return (
        f'<text x="{x}" y="{y}" fill="{color}" class="{kind}" style="{style}"{anchor}>'
        f"{escape(text)}</text>"
    )
