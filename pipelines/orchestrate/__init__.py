"""One graph: dvc.yaml as Airflow tasks, each in a workspace of its own."""
