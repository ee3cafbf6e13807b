"""Which expert gets how many bits: one file per method."""
