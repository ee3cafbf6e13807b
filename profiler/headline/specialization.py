"""Specialization of experts in domains, beside exchanged labels; and how specialization goes with local routing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.headline.subject import SEED, Rows, Subject, as_text, lengths_that_fit
from profiler.headline.vocabulary import SAMPLE_TOKENS, vocabulary_rows
from profiler.metrics import specialization
from profiler.metrics._intervals import resample_weights
from profiler.metrics._segments import best_threshold, segment_sums

NUM_RESAMPLES = 1000

SEGMENT_LENGTH = 16
"""Segment length of the SRP that specialization is held against, as published; shorter where the text is."""

NUM_RENAMINGS = 499

Values = NDArray[np.float64]


def specialization_rows(subject: Subject) -> Rows:
    """Domain and vocabulary specialization, and their correlation with SRP over the experts of the model."""
    rows = domain_rows(subject) + vocabulary_rows(subject)
    return rows + _correlation_rows(subject, rows)


def domain_rows(subject: Subject) -> Rows:
    """Both forms of domain specialization, of every MoE layer and of the model; the second of every expert too.

    Control "shuffled": the labels of the sequences exchanged at random. Nothing for a run of a single domain.
    """
    if len(subject.run.domains) < 2:
        return []
    texts = _traced(subject) if subject.has_trace else _counted(subject.run)
    if texts is None:
        return []
    place: dict[str, Any] = {"tokens": int(texts.tokens.sum())}
    place |= {"sequences": len(subject.lengths)} if subject.has_trace else {}
    rows: Rows = []
    largest: dict[str, list[Values]] = {}
    spread: dict[str, list[Values]] = {}
    for axis, layer in enumerate(subject.run.layers):
        where = {**place, "layer": layer.layer, "step": layer.step}
        for control, shares in texts.shares(axis).items():
            most = specialization.domain_specialization(shares=shares)
            each = specialization.domain_variation(shares=shares)
            largest.setdefault(control, []).append(most)
            spread.setdefault(control, []).append(each)
            where["control"] = control
            rows.append(_row("domain_specialization", most, where))
            rows.append(_row("domain_variation", _mean(each), where))
            if control == "observed":
                experts = [_row("domain_variation", each[:, expert], where) for expert in range(each.shape[1])]
                rows += [{**row, "expert": expert} for expert, row in enumerate(experts)]
        even = layer.top_k / layer.num_experts
        rows.append({**where, "metric": "domain_specialization", "control": "uniform", "value": even})
    for control, values in largest.items():
        rows.append(_row("domain_specialization", np.mean(values, axis=0), {**place, "control": control}))
    for control, values in spread.items():
        rows.append(_row("domain_variation", _mean(np.concatenate(values, axis=1)), {**place, "control": control}))
    return [row for row in rows if np.isfinite(row["value"])]


@dataclass
class _Texts:
    """The run's text by group of sequences of one domain: what shares of domains are drawn from.

    group_domain (groups,): index of the domain; tokens (groups,); counts: by layer, (groups, experts) selections.
    shuffled: the same by domain with exchanged labels, one group each; None where there are no sequences.
    """

    group_domain: NDArray[np.int64]
    tokens: NDArray[np.int64]
    counts: Sequence[NDArray[np.int64]]
    shuffled: _Texts | None = None

    @cached_property
    def weights(self) -> Values:
        """(1 + resamples, groups) how often each group is drawn, domain by domain; the first row is all once."""
        parts = [np.ones((1, len(self.group_domain)))]
        if np.bincount(self.group_domain).max() > 1:
            drawn = np.ones((NUM_RESAMPLES, len(self.group_domain)))
            for domain in np.unique(self.group_domain):
                mine = np.flatnonzero(self.group_domain == domain)
                drawn[:, mine] = resample_weights(num_sequences=len(mine), num_resamples=NUM_RESAMPLES, seed=SEED)
            parts.append(drawn)
        return np.concatenate(parts)

    def shares(self, axis: int) -> dict[str, Values]:
        """Shares of one layer by control, (1 + resamples, domains, experts); controls are not drawn anew."""
        members = [np.flatnonzero(self.group_domain == domain) for domain in range(self.group_domain.max() + 1)]
        counts = np.stack([self.weights[:, mine] @ self.counts[axis][mine] for mine in members], axis=1)
        tokens = np.stack([self.weights[:, mine] @ self.tokens[mine] for mine in members], axis=1)
        found = {"observed": specialization.domain_shares(counts=counts, tokens=tokens)}
        if self.shuffled is not None:
            found["shuffled"] = self.shuffled.shares(axis)["observed"]
        return found


def _traced(subject: Subject) -> _Texts | None:
    """Counts by group of sequences, and with the domains of the sequences exchanged."""
    from profiler.metrics._counts import counts_of, summed_by

    groups, layers = subject.groups, subject.run.layers
    domains = np.concatenate([block.domains for block in subject.blocks])
    _, label = np.unique(domains, return_inverse=True)
    _, owner = np.unique(groups.domain, return_inverse=True)
    exchanged = np.random.default_rng(SEED).permutation(label)
    count = int(label.max()) + 1
    counts = [np.zeros((groups.count, layer.num_experts), np.int64) for layer in layers]
    other = [np.zeros((count, layer.num_experts), np.int64) for layer in layers]
    for axis, layer in enumerate(layers):
        seen = 0
        for block in subject.blocks:
            found = counts_of(subject.ids(axis, block), block.offsets, layer.num_experts)
            mine = slice(seen, seen + len(found))
            counts[axis] += summed_by(found, groups.group[mine], groups.count)
            other[axis] += summed_by(found, exchanged[mine], count)
            seen += len(found)
    shuffled = _Texts(np.arange(count), summed_by(subject.lengths, exchanged, count), other)
    return _Texts(owner, summed_by(subject.lengths, groups.group, groups.count), counts, shuffled)


def _counted(run: store.Run) -> _Texts | None:
    """Counts by domain alone, of a run without a trace; None where a domain was never counted."""
    frame = run.table("expert_load").filter(pl.col("kind") == "routed")
    names = {name: index for index, name in enumerate(run.domains)}
    counts = []
    for layer in run.layers:
        part = frame.filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))
        summed = part.filter(pl.col("domain").is_in(names)).group_by("domain", "expert").agg(pl.col("tokens").sum())
        table = np.zeros((len(names), layer.num_experts), np.int64)
        rows = [names[domain] for domain in summed["domain"]]
        table[rows, summed["expert"].to_numpy()] = summed["tokens"].to_numpy()
        counts.append(table)
    tokens = counts[0].sum(axis=1) // run.layers[0].top_k
    return _Texts(np.arange(len(names)), tokens, counts) if tokens.all() else None


def _mean(values: Values) -> Values:
    """Mean over experts, of those that are used."""
    kept = np.isfinite(values)
    total: Values = np.where(kept, values, 0.0).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    return total


def _row(metric: str, values: Values, place: dict[str, Any]) -> dict[str, Any]:
    """A row with its interval; values (1 + resamples,), the estimate first, which alone has none.

    1.96 standard deviations of the resamples to either side: drawing anew adds the noise that lifts these figures, so
    quantiles would lie beside the value. How far noise lifts it is for the control to say.
    """
    row = {**place, "metric": metric, "value": float(values[0])}
    if len(values) > 1 and np.isfinite(values).all():
        reach = 1.96 * float(values[1:].std())
        row |= {"low": max(row["value"] - reach, 0.0), "high": row["value"] + reach}
    return row


def _correlation_rows(subject: Subject, rows: Rows) -> Rows:
    """Correlation of SRP with each form that has a figure per expert; control "renamed": experts renamed by layer."""
    lengths = [length for length in lengths_that_fit(subject.lengths) if length <= SEGMENT_LENGTH]
    if not subject.has_trace or not lengths:
        return []
    srp, figures = _expert_srp(subject, lengths[-1]), _expert_figures(subject.run, rows)
    sample = subject.sample(SAMPLE_TOKENS).block
    place: dict[str, Any] = {"metric": "specialization_correlation", "at": float(lengths[-1])}
    place |= {"tokens": sample.tokens, "sequences": len(sample.lengths)}
    found: Rows = []
    for name, figure in figures.items():
        value = specialization.correlation(np.concatenate(srp), np.concatenate(figure))
        if np.isnan(value):
            continue
        generator = np.random.default_rng(SEED)
        renamed = [
            specialization.correlation(np.concatenate(srp), np.concatenate([generator.permutation(f) for f in figure]))
            for _ in range(NUM_RENAMINGS)
        ]
        low, middle, high = np.nanquantile(renamed, [0.025, 0.5, 0.975]).tolist()
        place["parameters"] = as_text({"of": name})
        found.append({**place, "value": value})
        found.append({**place, "control": "renamed", "value": middle, "low": low, "high": high})
    return found


def _expert_srp(subject: Subject, length: int) -> list[Values]:
    """SRP of every expert, (experts,) for each layer, on the sample that vocabulary specialization rests on."""
    sample = subject.sample(SAMPLE_TOKENS)
    nobody = np.zeros(len(sample.block.lengths), np.int64)
    found = []
    for axis, layer in enumerate(subject.run.layers):
        sums = segment_sums(
            ids=sample.ids(axis), offsets=sample.block.offsets, num_experts=layer.num_experts, segment_length=length,
            group=nobody, num_groups=1,
        )  # fmt: skip
        used = sums.experts[:, 1:].any(axis=1)
        found.append(np.where(used, best_threshold(sums.experts, length)[0], np.nan))
    return found


def _expert_figures(run: store.Run, rows: Rows) -> dict[str, list[Values]]:
    """Figures per expert, (experts,) for each layer, by the kind of specialization."""
    axes = {(layer.layer, layer.step): axis for axis, layer in enumerate(run.layers)}
    found: dict[str, list[Values]] = {}
    for row in rows:
        if row.get("expert") is None:
            continue
        name = json.loads(row.get("parameters", "{}")).get("tokens", "domain")
        empty = [np.full(layer.num_experts, np.nan) for layer in run.layers]
        found.setdefault(name, empty)[axes[row["layer"], row["step"]]][row["expert"]] = row["value"]
    return found
