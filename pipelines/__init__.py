"""The stages of the pipeline. `dvc.yaml` says in which order, `params.yaml` with which numbers."""
