"""What a model must beat: a unigram and an interpolated Kneser-Ney bigram over the same tokens."""

import numpy
from numpy.typing import NDArray

DISCOUNT = 0.75  # the usual absolute discount


class Unigram:
    """Token frequencies with one added to every count."""

    def __init__(self, *, stream: NDArray[numpy.integer], vocabulary: int) -> None:
        counts = numpy.bincount(stream, minlength=vocabulary) + 1.0
        self.probabilities = counts / counts.sum()

    def losses(self, *, previous: NDArray[numpy.integer], following: NDArray[numpy.integer]) -> NDArray[numpy.float64]:
        """Return -ln p of each following token, (tokens,); `previous` does not matter."""
        losses: NDArray[numpy.float64] = -numpy.log(self.probabilities[following])
        return losses


class Bigram:
    """Interpolated Kneser-Ney (Chen and Goodman 1998): p(w|v) = (c(v,w) - D) / c(v) + D n(v) / c(v) q(w).

    n(v) is the number of kinds of tokens seen after v; q(w) is proportional to the number of kinds of tokens seen
    before w, itself discounted towards the uniform distribution, so that nothing has probability 0.
    """

    def __init__(self, *, stream: NDArray[numpy.integer], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        pairs = stream[:-1].astype(numpy.int64) * vocabulary + stream[1:]
        self.keys, self.counts = numpy.unique(pairs, return_counts=True)
        self.totals = numpy.bincount(self.keys // vocabulary, weights=self.counts, minlength=vocabulary)
        self.kinds_after = numpy.bincount(self.keys // vocabulary, minlength=vocabulary)
        kinds_before = numpy.bincount(self.keys % vocabulary, minlength=vocabulary)
        discounted = numpy.maximum(kinds_before - DISCOUNT, 0.0)
        self.continuation = (discounted + (len(self.keys) - discounted.sum()) / vocabulary) / len(self.keys)

    def losses(self, *, previous: NDArray[numpy.integer], following: NDArray[numpy.integer]) -> NDArray[numpy.float64]:
        """Return -ln p of each following token given the previous one, (tokens,)."""
        wanted = previous.astype(numpy.int64) * self.vocabulary + following
        places = numpy.minimum(numpy.searchsorted(self.keys, wanted), len(self.keys) - 1)
        counts = numpy.where(self.keys[places] == wanted, self.counts[places], 0)
        totals = numpy.maximum(self.totals[previous], 1)
        backed_off = numpy.where(self.totals[previous] > 0, DISCOUNT * self.kinds_after[previous] / totals, 1.0)
        seen = numpy.maximum(counts - DISCOUNT, 0.0) / totals
        losses: NDArray[numpy.float64] = -numpy.log(seen + backed_off * self.continuation[following])
        return losses
