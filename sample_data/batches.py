"""Training batches: as many sequences of every domain, a pure function of the step, so that resuming is exact."""

from pathlib import Path

import numpy
import torch
from safetensors.numpy import load_file
from torch import Tensor

from sample_data.sources import DOMAINS


class Batches:
    """The token streams cut into sequences, each begun by BOS; every epoch of a domain is shuffled anew."""

    def __init__(self, path: Path, *, length: int, rows: int, bos: int, seed: int) -> None:
        streams = load_file(path)
        self.rows, self.bos, self.seed = rows, bos, seed
        self.pieces = [
            streams[domain][: streams[domain].size // (length - 1) * (length - 1)].reshape(-1, length - 1)
            for domain in DOMAINS
        ]
        self.orders: dict[tuple[int, int], numpy.ndarray] = {}

    def order(self, domain: int, epoch: int) -> numpy.ndarray:
        """Return the order of a domain's pieces in an epoch."""
        if (domain, epoch) not in self.orders:
            generator = numpy.random.default_rng([self.seed, domain, epoch])
            self.orders[domain, epoch] = generator.permutation(len(self.pieces[domain]))
        return self.orders[domain, epoch]

    def batch(self, step: int) -> Tensor:
        """Return ids (domains * rows, length), int64, of a step (from 0); a domain's rows follow one another."""
        rows = []
        for domain, pieces in enumerate(self.pieces):
            for row in range(step * self.rows, (step + 1) * self.rows):
                epoch, index = divmod(row, len(pieces))
                rows.append(pieces[self.order(domain, epoch)[index]].astype(numpy.int64))
        return torch.nn.functional.pad(torch.from_numpy(numpy.stack(rows)), (1, 0), value=self.bos)
