"""Which sequence, position, domain and phase each token of a forward belongs to, and which tokens are padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moescope.errors import InputError
from profiler.capture.batch import Group, LayerKey, Tokens
from profiler.capture.inputs import MODALITIES, ForwardInputs


@dataclass
class Label:
    """What the caller says about the rows of the next batch."""

    domains: list[str] | None = None
    sequences: list[int] | None = None
    sources: list[str] | None = None
    mask: Tensor | None = None
    axes: dict[str, list[str]] = field(default_factory=dict)


@dataclass(eq=False)
class BatchRows:
    """The sequences in the rows of a batch, followed through a generation.

    Attributes:
        sequences: their numbers in the run.
        domains: their domains.
        sources: the documents they come from.
        axes: by name of a caller's axis, where each row lies on it.
        lengths: (rows,) real tokens so far, on the device.
        prompt_lengths: (rows,) of which prompt.
        finished: (rows,) bool: the row has fed its end token; what generate feeds it after that is no text.
        columns: tokens per row so far, padding included, as the cache counts them.
        first_seen: see :class:`~profiler.capture.batch.Tokens`.
    """

    sequences: list[int]
    domains: list[str]
    sources: list[str]
    lengths: Tensor
    prompt_lengths: Tensor
    finished: Tensor
    columns: int = 0
    axes: dict[str, list[str]] = field(default_factory=dict)
    first_seen: dict[tuple[LayerKey, str], Tensor] = field(default_factory=dict)


class SequenceTracker:
    """Follows sequences through forwards: a new batch, or the next tokens of rows whose cache is known.

    Args:
        domain: label of rows that nobody labels otherwise.
        end_ids: ids of end tokens.
        pad_ids: ids of padding tokens.
        modality_ids: ids of the tokens that stand for something else than text, with what it is. Statistics of such
            tokens are kept under the label ``DOMAIN:image`` and the like.

    Attributes:
        domain: label of rows that nobody labels otherwise.
        axes: where all rows lie on further axes, unless a row is labelled otherwise.
        next_sequence: number of the next sequence; a resumed run goes on after its last.
        groups: the (domain, phase) pairs that occurred; what :class:`Tokens` has indices into.
        findings: what could not be known or was left out, with how often.
        again: the text has been run before, through other layers: its sequences are known.
    """

    def __init__(
        self,
        *,
        domain: str,
        end_ids: Sequence[int],
        pad_ids: Sequence[int],
        modality_ids: Mapping[int, str] | None = None,
    ) -> None:
        self.domain = domain
        self.axes: dict[str, str] = {}
        self._modality_ids = dict(modality_ids or {})
        self.next_sequence = 0
        self.groups: list[Group] = []
        self.findings: Counter[str] = Counter()
        self.again = False
        self._end_ids, self._stop_ids = sorted(set(end_ids)), sorted({*end_ids, *pad_ids})
        self._label = Label()
        self._caches: WeakKeyDictionary[Any, BatchRows] = WeakKeyDictionary()
        self._touched: dict[int, BatchRows] = {}
        self._went_on: Tensor | None = None
        self._before = (self._label, self.next_sequence)
        self._fed: Tensor | None = None

    def label(self, label: Label) -> None:
        """Say what the rows of the next batch are."""
        self._label = label

    def begin(self, inputs: ForwardInputs) -> tuple[Tokens, BatchRows]:
        """The tokens of a forward that is about to run; :meth:`commit` or :meth:`abort` says how it ended."""
        self._before = (self._label, self.next_sequence)
        past = _cache_length(inputs.cache)
        rows = self._caches.get(inputs.cache) if inputs.cache is not None and past else None
        if rows is not None and len(rows.sequences) != inputs.shape[0]:
            self.findings["rows changed"] += 1
            rows = None
        mask, known = self._mask(inputs, past)
        decode = bool(past) and inputs.shape[1] == 1
        if rows is None:
            self._look_for_repetition(inputs, past)
            rows = self._new_rows(inputs, past, mask)
        elif past < rows.columns:
            self._take_back(rows, rows.columns - past)
        valid = None if mask is None else mask[:, -inputs.shape[1] :]
        if decode:
            valid = self._without_finished(inputs, rows, valid)
        else:
            rows.finished = torch.zeros_like(rows.finished)
        if not known:
            self.findings["mask unknown"] += 1
        return self._tokens(inputs, rows, valid, "decode" if decode else "prompt"), rows

    def commit(self, tokens: Tokens, rows: BatchRows, inputs: ForwardInputs, caches: Sequence[Any]) -> None:
        """The forward has run: its tokens belong to the sequences, and its cache names them from now on."""
        added = torch.zeros_like(rows.lengths).index_add_(0, tokens.batch_row, torch.ones_like(tokens.batch_row))
        rows.lengths = rows.lengths + added
        if tokens.present and all(tokens.groups[group][1] == "prompt" for group in tokens.present):
            rows.prompt_lengths = rows.prompt_lengths + added
        rows.columns += inputs.shape[1]
        if not self.again:
            self._touched[id(rows)] = rows
        for cache in caches:
            if cache is not None:
                self._caches[cache] = rows

    def abort(self) -> None:
        """The forward failed: the next one takes its sequence numbers and its label."""
        self.findings["failed forward"] += 1
        self._label, self.next_sequence = self._before

    def drain(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of tables ``sequence`` and ``sequence_label`` for the sequences that grew since the last call."""
        grown = list(self._touched.values())
        self._touched.clear()
        table, labels = [], []
        for rows in grown:
            for axis, values in rows.axes.items():
                pairs = zip(rows.sequences, values, strict=True)
                labels += [{"sequence": number, "axis": axis, "value": value} for number, value in pairs]
            lengths, prompts = rows.lengths.tolist(), rows.prompt_lengths.tolist()
            columns = zip(rows.sequences, rows.domains, rows.sources, lengths, prompts, strict=True)
            names = ("sequence", "domain", "source", "tokens", "prompt_tokens")
            table += [dict(zip(names, values, strict=True)) for values in columns]
        if self._went_on is not None:
            self.findings["went on after the end"] += int(self._went_on)
            self._went_on = None
        return table, labels

    def _new_rows(self, inputs: ForwardInputs, past: int, mask: Tensor | None) -> BatchRows:
        label, self._label = self._label, Label()
        count = inputs.shape[0]
        numbers = label.sequences
        if numbers is None:
            numbers = list(range(self.next_sequence, self.next_sequence + count))
        self.next_sequence = max(self.next_sequence, max(numbers, default=-1) + 1)
        domains = label.domains if label.domains is not None else [self.domain] * count
        sources = label.sources if label.sources is not None else [""] * count
        if not len(numbers) == len(domains) == len(sources) == count:
            raise InputError(
                f"label() names {len(numbers)} sequences, {len(domains)} domains and {len(sources)} sources, but the"
                f" batch has {count} rows: give one of each per row"
            )
        axes = {axis: [value] * count for axis, value in self.axes.items()} | label.axes
        for axis, values in axes.items():
            if len(values) != count:
                raise InputError(
                    f"label() names {len(values)} values of axis {axis!r}, but the batch has {count} rows: give one"
                    " per row, or a single one for all"
                )
        start = torch.zeros(count, dtype=torch.int64, device=inputs.device)
        if past:
            self.findings["cached prefix"] += count
            before = mask[:, : -inputs.shape[1]] if mask is not None else None
            start = start + (before.sum(1) if before is not None and before.shape[1] == past else past)
        finished = torch.zeros(count, dtype=torch.bool, device=inputs.device)
        return BatchRows(
            list(numbers), list(domains), list(sources), start, torch.zeros_like(start), finished, past, axes
        )

    def _mask(self, inputs: ForwardInputs, past: int) -> tuple[Tensor | None, bool]:
        """(batch, past + length or length) bool, None where all tokens are real; and whether that is known."""
        mask = self._label.mask if self._label.mask is not None else inputs.attention_mask
        if mask is None:
            return None, True
        width, length = getattr(mask, "shape", (0, 0))[-1], inputs.shape[1]
        if getattr(mask, "ndim", 0) != 2 or width < length or mask.shape[0] != inputs.shape[0]:
            return None, False
        mask = mask.to(inputs.device) != 0
        # A mask as long as a static cache has columns for tokens that are still to come.
        return (mask[:, : past + length] if width > past + length else mask), True

    def _without_finished(self, inputs: ForwardInputs, rows: BatchRows, valid: Tensor | None) -> Tensor | None:
        """Leave out rows that generate keeps feeding after their end token because other rows go on."""
        if inputs.input_ids is None or not self._end_ids or inputs.shape[0] == 1:
            return valid
        fed = inputs.input_ids[:, -1]
        ends = torch.isin(fed, torch.tensor(self._end_ids, device=fed.device))
        stops = torch.isin(fed, torch.tensor(self._stop_ids, device=fed.device))
        went_on = (rows.finished & ~stops).sum()
        self._went_on = went_on if self._went_on is None else self._went_on + went_on
        rows.finished = (rows.finished & stops) | ends
        real = ~rows.finished[:, None]
        return real if valid is None else valid & real

    def _look_for_repetition(self, inputs: ForwardInputs, past: int) -> None:
        """Generation without a cache feeds the whole text again for each token, and each time it would count."""
        before, self._fed = self._fed, None if past else inputs.input_ids
        now = inputs.input_ids
        if now is None or before is None or past or now.shape != (before.shape[0], before.shape[1] + 1):
            return
        if now.device == before.device and torch.equal(now[:, :-1], before):
            self.findings["fed again"] += 1

    def _take_back(self, rows: BatchRows, columns: int) -> None:
        """The cache was cropped: tokens that were recorded have been rejected (speculative decoding)."""
        self.findings["rejected"] += columns * len(rows.sequences)
        rows.columns -= columns
        rows.lengths = (rows.lengths - columns).clamp_min(0)
        rows.prompt_lengths = torch.minimum(rows.prompt_lengths, rows.lengths)

    def _tokens(self, inputs: ForwardInputs, rows: BatchRows, valid: Tensor | None, phase: str) -> Tokens:
        batch, length = inputs.shape
        device = inputs.device
        numbers = torch.tensor(rows.sequences, device=device)
        groups = [self._group((domain, phase)) for domain in rows.domains]
        if valid is not None and bool(valid.all()):
            valid = None
        if valid is None:
            position = rows.lengths[:, None] + torch.arange(length, device=device)
        else:
            position = rows.lengths[:, None] + valid.cumsum(1) - 1
        batch_row = torch.arange(batch, device=device).repeat_interleave(length)
        keep = None if valid is None else valid.reshape(-1).nonzero()[:, 0]
        flat, modality = position.reshape(-1), self._modality(inputs)
        if keep is not None:
            batch_row, flat = batch_row[keep], flat[keep]
            modality = None if modality is None else modality[keep]
        group = torch.tensor(groups, device=device)[batch_row]
        if modality is not None:
            group = self._group_by_modality(group, modality)
            groups = group.tolist()
        return Tokens(
            sequence=numbers[batch_row],
            position=flat,
            group=group,
            groups=self.groups,
            rows=batch * length,
            keep=keep,
            batch_row=batch_row,
            first_seen=rows.first_seen,
            present=sorted(set(groups)),
            modality=modality,
        )

    def _modality(self, inputs: ForwardInputs) -> Tensor | None:
        """(batch x length,) index into ``MODALITIES``, by the processor's mask or else the ids; None if all is text."""
        types = None if inputs.token_types is None else inputs.token_types.to(inputs.device)
        if types is None and self._modality_ids and inputs.input_ids is not None:
            types = torch.zeros_like(inputs.input_ids)
            for token, name in self._modality_ids.items():
                types[inputs.input_ids == token] = MODALITIES.index(name)
        return types.reshape(-1).clamp(0, len(MODALITIES) - 1) if types is not None and bool(types.any()) else None

    def _group_by_modality(self, group: Tensor, modality: Tensor) -> Tensor:
        """(tokens,) the groups of tokens that are no text get a label of their own."""
        apart = group.clone()
        for entry, kind in torch.stack([group, modality], 1).unique(dim=0).tolist():
            if kind:
                domain, phase = self.groups[entry]
                label = self._group((f"{domain}:{MODALITIES[kind]}", phase))
                apart[(group == entry) & (modality == kind)] = label
        return apart

    def _group(self, group: Group) -> int:
        if group not in self.groups:
            self.groups.append(group)
        return self.groups.index(group)


def _cache_length(cache: Any) -> int:
    """Tokens per row that a cache holds, padding included; 0 for none, or for one that cannot say."""
    try:
        return int(cache.get_seq_length()) if cache is not None else 0
    except (AttributeError, TypeError, ValueError, IndexError):
        return 0
