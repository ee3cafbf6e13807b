"""What recorders share: the protocol, and sums that are kept apart by layer and group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from profiler.capture.batch import Group, LayerKey, Tokens

Batch = TypeVar("Batch", contravariant=True)
SumKey = tuple[LayerKey, Group]


class Recorder(Protocol[Batch]):
    """A statistic: it is given batches and gives partial sums as tables."""

    def update(self, batch: Batch) -> None:
        """Add a batch."""

    def drain(self) -> dict[str, pl.DataFrame]:
        """The sums since the last drain, by table of the run file; they start again from nothing."""


class Sums:
    """Float64 sums of equal shape, one per layer and group, on the host; the last axis may grow with k."""

    def __init__(self) -> None:
        self._sums: dict[SumKey, NDArray[np.float64]] = {}

    def add(self, key: SumKey, values: NDArray[np.float64]) -> None:
        """Add values to what stands under the key."""
        before = self._sums.get(key)
        if before is None:
            self._sums[key] = values.copy()
        elif before.shape == values.shape:
            before += values
        else:
            width = max(before.shape[-1], values.shape[-1])
            self._sums[key] = _widened(before, width) + _widened(values, width)

    def drain(self) -> Iterator[tuple[SumKey, NDArray[np.float64]]]:
        """Everything, and start again."""
        sums, self._sums = self._sums, {}
        yield from sums.items()


def _widened(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])


def groups_by_name(tokens: Tokens) -> list[int]:
    """The groups that occur, in an order that depends on their names alone: the last bit of a product depends on it,
    and a worker meets domains in another order than one process that sees all text.
    """
    return sorted(tokens.present, key=lambda entry: tokens.groups[entry])


def group_matrix(tokens: Tokens, present: Sequence[int], device: torch.device) -> Tensor:
    """(present groups, tokens) float32, 1 where a token is of the group: a product with it sums tokens by group."""
    entries = torch.tensor(present, device=device)
    return (entries[:, None] == tokens.group.to(device)[None]).float()


def scatter_sum(keys: Tensor, values: Tensor | None, size: int) -> Tensor:
    """(size,) float64 sums of ``values`` (ones if None) by key; keys and values are flat and of equal length."""
    if keys.device.type == "cpu":
        weights = None if values is None else values.double()
        return torch.bincount(keys, weights, minlength=size).double()
    ones = torch.ones_like(keys, dtype=torch.float64) if values is None else values.double()
    return torch.zeros(size, dtype=torch.float64, device=keys.device).index_add_(0, keys, ones)


def row_norm(rows: Tensor) -> Tensor:
    """(rows,) float32 L2 norm of each row; 0 for a row with a value that is no finite number."""
    return finite(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))


def row_maximum(rows: Tensor) -> Tensor:
    """(rows,) float32 largest absolute value of each row; NaN as 0, infinity as the largest number, for it shows there.

    The norm of order infinity would say the same twenty times slower on a CPU.
    """
    if rows.dtype == torch.float32:
        return torch.nan_to_num(torch.maximum(rows.amax(1), -rows.amin(1)), nan=0.0)
    return torch.nan_to_num(rows.abs().amax(1).float(), nan=0.0)


def finite(values: Tensor) -> Tensor:
    """NaN and infinity as 0: one broken token must not undo the sums over all others.

    The checks fail a run whose logits, gate weights or outputs are broken, so nobody takes it for sound.
    """
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def vector_domain(batch_groups: list[Group], entry: int, *, by_domain: bool) -> str:
    """The domain under which a vector of a group is kept: empty where vectors are pooled."""
    return batch_groups[entry][0] if by_domain else ""


def token_parts(tokens: Tokens, device: torch.device, *, by_domain: bool) -> list[tuple[str, str, Tensor | None]]:
    """(domain, phase, mask of the tokens) by which vectors are kept apart; None = all tokens."""
    names: dict[tuple[str, str], list[int]] = {}
    for entry in tokens.present:
        name = (vector_domain(tokens.groups, entry, by_domain=by_domain), tokens.groups[entry][1])
        names.setdefault(name, []).append(entry)
    if len(names) == 1:
        return [(*next(iter(names)), None)]
    group = tokens.group.to(device)
    masks = {name: torch.isin(group, torch.tensor(entries, device=device)) for name, entries in names.items()}
    return [(*name, mask) for name, mask in masks.items()]


def float_lists(values: Tensor | NDArray[Any]) -> pl.Series:
    """(rows, width) values as a series of lists, 32 bits: what vectors are stored in."""
    return pl.Series(np.ascontiguousarray(_host(values), dtype=np.float32)).arr.to_list()


def double_lists(values: Tensor | NDArray[Any]) -> pl.Series:
    """(rows, width) values as a series of lists of float64."""
    return pl.Series(np.ascontiguousarray(_host(values), dtype=np.float64)).arr.to_list()


def integer_lists(values: Tensor | NDArray[Any]) -> pl.Series:
    """(rows, width) counts as a series of lists of int64."""
    return pl.Series(np.ascontiguousarray(np.rint(_host(values)), dtype=np.int64)).arr.to_list()


def _host(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values


def columns_of(key: LayerKey, group: Group) -> dict[str, Any]:
    """The columns that name a layer and a group."""
    return {"layer": key[0], "step": key[1], "domain": group[0], "phase": group[1]}


def literals(values: Mapping[str, Any]) -> dict[str, pl.Expr]:
    """Constant columns."""
    return {name: pl.lit(value) for name, value in values.items()}
