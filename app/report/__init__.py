"""A run as one document: provenance, findings with their evidence, every exhibit, and what is absent and why."""
