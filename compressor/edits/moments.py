"""Second moments of one layer: what method ``subspace`` needs beside the weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerMoments:
    """Sums over the tokens of a run.

    Attributes:
        input: (H, H) sum of x x' over what enters the layer's experts; of all tokens, not of each expert's own.
        activation_square: (E, I) sum of a^2 per neuron, over the tokens that each expert was given.
    """

    input: Tensor
    activation_square: Tensor
