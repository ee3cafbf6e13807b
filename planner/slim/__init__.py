"""Which neurons of the experts go: one file per score, ``forms`` for how what stays is stored."""
