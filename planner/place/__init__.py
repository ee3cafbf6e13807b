"""Which device of an expert-parallel group holds which experts, one file per method."""
