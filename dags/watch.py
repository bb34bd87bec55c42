"""### watch: has the world moved away from the champion?

**What it does.** Once a month of data is complete: `fetch` to `featurize` with the clock at the end
of the interval, `score` of the newest window with the champion, `drift` of features, predictions,
labels and performance against what the champion knew. Where the verdict is drift, it triggers
`retrain` with the same clock and the reason.

**Who starts it.** The schedule. It is paused until a person switches it on. To catch up:
`airflow backfill create --dag-id watch --from-date 2013-02-01 --to-date 2013-07-01`; months run
side by side, and what was computed before is not computed again. Airflow's own database must be
PostgreSQL for that: on SQLite it loses runs (docs/decisions/0014-backfills-on-postgresql.md).

**When it is red.** The last line of the task's log says what is wrong; the table of `retrain` holds
here too. `champion: error: … has no champion` means that no version was registered that passed:
run `retrain` first. What a line calls the task `package` is `champion` here: it brings the bundle.
"""

from datetime import datetime, timedelta

from airflow.sdk import DAG, CronDataIntervalTimetable

from pipelines.orchestrate import render

with DAG(
    "watch",
    schedule=CronDataIntervalTimetable("0 0 1 * *", timezone="UTC"),
    start_date=datetime(2013, 1, 1),
    catchup=False,
    doc_md=__doc__,
    description="newest month → drift verdict → retrain",
    tags=["headrace"],
    max_active_runs=3,
    dagrun_timeout=timedelta(hours=6),
):
    begin, champion = render.begin(), render.effect("champion")
    tasks = render.stages(
        after=begin,
        only=("fetch", "load", "validate", "featurize", "score", "drift"),
        instead={"package": champion},
    )
    render.retrain_on_drift(begin, tasks["drift"], render.unite(tasks))
