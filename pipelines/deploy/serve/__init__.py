"""serve: one replica of the service; `python -m pipelines.deploy.serve --help`."""
