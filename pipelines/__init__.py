"""The stages of the pipeline. `dvc.yaml` says in which order, `params.yaml` with which numbers."""

import gc

# A stage is a process of seconds that imports much and frees little: to look for garbage after
# every 700 new objects is a fifth of the time of its imports.
gc.set_threshold(100_000, 20, 100)
