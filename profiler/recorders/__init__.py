"""One file per statistic: ``update(batch)`` adds a batch, ``drain()`` gives the sums since the last drain as tables."""
