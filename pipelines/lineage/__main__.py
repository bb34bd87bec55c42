"""lineage: of which data, by which stages, the bundle on the disk was made.

in:   models/bundle/, dvc.lock; what lies in data/ and reports/; the journal of this machine
out:  the graph back to the raw files, as text, and drawn in reports/lineage/lineage.svg;
      or, of one COLUMN, the columns it comes from
run:  make lineage, or python -m pipelines.lineage [COLUMN]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from pipelines import bundle, stage
from pipelines.errors import UserError
from pipelines.lineage import columns, datasets, history, picture, steps
from pipelines.lineage.datasets import Dataset, File
from pipelines.lineage.history import Given, Link
from pipelines.lineage.steps import Step

PICTURE = Path("reports/lineage/lineage.svg")


def main() -> int:
    """Exit status: 0, 2 where the user can mend it, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.lineage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("column", nargs="?", metavar="COLUMN", help="from which columns it comes")
    column = parser.parse_args().column
    return stage.guarded("lineage", lambda _: origins(column) if column else show())


def show() -> None:
    """The graph as text and as a picture."""
    links = history.of(bundle.FOLDER.as_posix())
    digest = stage.digest(bundle.FOLDER)
    print("\n".join(text(links, digest)))
    with stage.whole(PICTURE) as partial:
        partial.write_text(picture.svg(links, digest), encoding="utf-8")
    print(f"\ndrawn in {PICTURE}")


def text(links: list[Link], digest: str) -> Iterator[str]:
    """The graph as a tree, the bundle first; what was told once is not told again."""
    makers = {given.path: (link, given) for link in links for given in link.given}
    told: set[str] = set()

    def tree(path: str, first: str, rest: str) -> Iterator[str]:
        link, given = makers[path]
        if path in told:
            yield f"{first}{path} (above)"
            return
        told.add(path)
        yield _line(first + path, given.content, given.md5[:8], f"{link.moment} {link.who}")
        yield f"{rest}└─ {link.step.name}"
        files = given.content.files if given.content and not link.step.inputs else ()
        branches: list[str | File] = [*link.step.inputs, *files]
        for one in branches:
            here, below = ("└─ ", "   ") if one is branches[-1] else ("├─ ", "│  ")
            if isinstance(one, File):
                yield _line(f"{rest}   {here}{one.path}", one, one.md5)
            else:
                yield from tree(one, f"{rest}   {here}", f"{rest}   {below}")

    yield f"bundle {digest[:12]}"
    yield f"{'':<52}{'rows':>10}  md5"
    yield from tree(bundle.FOLDER.as_posix(), "", "")
    if any(not given.here for link in links for given in link.given):
        yield "without rows: not on this disk as it was then; dvc checkout brings it back"


def _line(name: str, held: Dataset | File | None, md5: str, made: str = "") -> str:
    rows = "" if held is None or held.rows is None else f"{held.rows:,}"
    return f"{name:<52}{rows:>10}  {md5}  {made}".rstrip()


def origins(column: str) -> None:
    """The columns from which it comes, table by table, back to the raw ones."""
    links = history.of(bundle.FOLDER.as_posix())
    held = {one.path: _tables(one) for link in links for one in link.given}
    wanted: dict[str, set[str]] = {}
    for link in links:
        inputs = [table for path in link.step.inputs for table in held[path]]
        for table in (table for one in link.given for table in held[one.path]):
            if not wanted and column in table.columns:
                wanted[table.name] = {column}
            if not (names := wanted.get(table.name)):
                continue
            print(f"{table.name:<20}  {', '.join(sorted(names))}")
            sources = _sources(link.step, table, inputs)
            for name in sorted(names) if inputs else ():
                if not sources.get(name):
                    why = "counts rows" if name in sources else "makes it, and no SQL says of what"
                    print(f"{'':<20}  {name}: {link.step.name} {why}")
            for source, field in {one for name in names for one in sources.get(name, ())}:
                wanted.setdefault(source, set()).add(field)
    if not wanted:
        raise UserError(f"no table on this disk that led to {bundle.FOLDER} has a column {column}")


def _tables(given: Given) -> list[Dataset]:
    return datasets.tables(given.content) if given.content else []


def _sources(step: Step, table: Dataset, inputs: list[Dataset]) -> columns.Sources:
    """Raises UserError where the query, or a table it reads, is not what the step had."""
    if step.sql is None:
        return columns.of_chosen(table, inputs)
    if datasets.read(step.sql).md5 != step.files[step.sql]:
        raise UserError(f"{step.sql} changed after {step.name} ran: dvc repro {step.name}")
    if not inputs or not all(one.columns for one in inputs):
        paths = " ".join(step.inputs)
        raise UserError(f"{paths} is not on this disk as {step.name} read it: dvc checkout {paths}")
    return steps.labelled(columns.of_query(Path(step.sql).read_text(encoding="utf-8"), inputs))


if __name__ == "__main__":
    sys.exit(main())
