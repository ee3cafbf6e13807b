"""Which experts, MoE blocks or decoder layers go: one file per method, ``scored`` for all that rank by a score."""
