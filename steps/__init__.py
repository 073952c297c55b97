"""One standalone script a step of the pipeline: `python -m steps.STEP --help`."""
