"""### retrain: from raw data to a bundle that is served

**What it does.** Every stage of `dvc.yaml` in a workspace of its own, then `unite` (one `dvc.lock`
for the run, checked and recorded), `register` (the bundle becomes a version in MLflow), `gate` (is
it as good as the champion on the same rows?) and `release` (beside the champion it gets a growing
share of the traffic, judged at each step; then it is champion, or the old one is back). Where
`release.approval` is set, a person decides between the two: `ask`, under Required Actions.

**Who starts it.** A person with the form of this page, `watch` when it finds drift, or the API.
Empty fields of the form mean: as `params.yaml` says.

**When it is red.** The last line of the task's log says what is wrong.

- `STAGE: error: …` is a mistake in data or params, and is not tried again. Mend it, trigger a new
  run.
- `STAGE: fault: …` is the system; it failed again in every retry. Clear the task: what was computed
  is kept.
- `… cannot be had: … missing or damaged`: the store lost an object. Clear the stage that the line
  names, with its downstream.
- `… published nothing in the run`: a stage was skipped or marked by hand. Clear that task.
- `gate: error: … may not be released`: the model is not good enough, and the line says where. The
  version stays, to be looked at. `approval: error: … rejected`: a person said no.
- `release: error: …`: the challenger was judged bad under traffic and the champion serves all of it
  again; the line and the version's tags say why.

A run never harms another: each has its workspaces, its params and its lock.
"""

from datetime import timedelta

from airflow.sdk import DAG

from pipelines.orchestrate import render

with DAG(
    "retrain",
    schedule=None,
    params=render.form(),
    doc_md=__doc__,
    description="raw data → served bundle",
    tags=["headrace"],
    max_active_runs=4,
    dagrun_timeout=timedelta(hours=12),
    is_paused_upon_creation=False,  # it has no schedule: it starts only when told
):
    lock = render.unite(render.stages(after=render.begin()))
    gate = render.effect("gate")
    lock >> render.effect("register") >> gate
    render.release(after=gate)
