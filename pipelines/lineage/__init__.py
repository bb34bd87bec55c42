"""Lineage: of which data, by which stages, a thing was made.

record    tells of a stage's run in OpenLineage's words, beside the stage
journal   the events of this machine
events    the words: facets of runs, jobs and datasets
steps     what a stage reads and gives: dvc.yaml, dvc.lock
datasets  what a path holds: rows, columns, hash
columns   which columns go into a column
history   how the bundle on the disk came to be
picture   the same, drawn
"""

from uuid import NAMESPACE_URL, uuid5

NAMESPACE = "headrace"


def parent(run: str) -> dict[str, str]:
    """The variable by which a stage knows of which run it is a part, as OpenLineage has it: a job,
    and a UUID, which every task of the run derives alike.
    """
    return {"OPENLINEAGE_PARENT_ID": f"{NAMESPACE}/run/{uuid5(NAMESPACE_URL, run)}"}
