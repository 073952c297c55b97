"""What steps make and how it is kept: manifests, provenance, the step cache and its keys."""
