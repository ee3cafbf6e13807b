"""Which experts are rebuilt from few numbers, and with whom they share them: one file per method."""
