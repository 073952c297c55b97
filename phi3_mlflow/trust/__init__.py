"""Whether a version is the one that was made and passed: signatures, provenance, the policy."""
