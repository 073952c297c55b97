"""MLflow: the tracking store, runs, the registry, and moving the alias `champion`."""
