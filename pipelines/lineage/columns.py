"""Which columns go into a column, as far as the SQL of a stage says it."""

from collections.abc import Iterable
from pathlib import Path

from pipelines.lineage.datasets import Dataset

# Each column → the (table, column) whose values go into it.
Sources = dict[str, list[tuple[str, str]]]


def of_query(sql: str, inputs: Iterable[Dataset]) -> Sources:
    """Of every column that the query gives. It names a table by the last part of its path.

    What only chooses, joins or orders rows is no source. Raises sqlglot's SqlglotError for what it
    cannot read.
    """
    from sqlglot import exp
    from sqlglot.lineage import lineage

    tables = {Path(one.name).name: one for one in inputs}
    schema = {view: dict.fromkeys(one.columns, "string") for view, one in tables.items()}
    nodes = lineage(None, sql, schema, dialect="spark", trim_selects=False)
    # Where a trace ends in no table, it ends in a constant.
    return {
        column: sorted(
            {
                (tables[leaf.expression.name].name, leaf.name.rpartition(".")[2])
                for leaf in node.walk()
                if isinstance(leaf.expression, exp.Table)
            }
        )
        for column, node in nodes.items()
    }


def of_chosen(table: Dataset, inputs: Iterable[Dataset]) -> Sources:
    """Of a table whose stage has no query: if it has every column of one that was read, rows were
    chosen; else nothing is known.
    """
    for one in inputs:
        if one.columns and one.columns.keys() <= table.columns.keys():
            return {column: [(one.name, column)] for column in one.columns}
    return {}
