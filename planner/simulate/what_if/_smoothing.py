"""Kernel that mixes router probabilities with those of the tokens before, and chooses anew.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np

from planner.simulate.what_if._rows import GROUP, Ids, Values32, entropy, exponentials, reordered, scale_32, take
from profiler.metrics._arrays import FloatArray, IntArray

_ZERO, _ONE = np.float32(0), np.float32(1)
_RESOLVED = np.float32(1e-9)


@reordered
def smoothed(
    ids: Ids, logits: Values32, log_partition: Values32, own: IntArray, agreeing: IntArray, sequence: IntArray,
    values: Values32, window: int, temperature: float, load: IntArray, sums: IntArray, kept: FloatArray,
    entropies: FloatArray, shared: IntArray,
) -> None:  # fmt: skip
    """Add tokens to the sums of all values, and to those before in the last row.

    ids, logits (tokens, m) in descending logit, -1 = none; log_partition, own, agreeing (0 or 1), sequence (tokens,);
    values (V,). load (V + 1, E); sums (V, 4): same sets, own selections kept, new ones, same sets of tokens that agree;
    kept (V + 1,): probability P of those chosen; entropies (V + 1,) in nats; shared (V + 1, 2): selections that the
    token before made, too, of so many.
    """
    tokens, m = ids.shape
    experts, tried = load.shape[1], len(values)
    padded = (experts + GROUP - 1) // GROUP * GROUP
    probability, direction = np.empty((window, experts), np.float32), np.empty((window, experts), np.float32)
    now, towards, mixed = np.empty(experts, np.float32), np.empty(experts, np.float32), np.empty(experts, np.float32)
    listed, shifted, factors = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32)
    whole, powers = shifted.view(np.int32), factors.view(np.int32)
    alike, shifted_alike = np.empty(window, np.float32), np.empty(window, np.float32)
    factors_alike = np.empty(window, np.float32)
    whole_alike, powers_alike = shifted_alike.view(np.int32), factors_alike.view(np.int32)
    work, mantissas = np.zeros(padded, np.float32), np.empty(experts, np.float32)
    binary = np.empty(experts, np.int32)
    bits, rest_bits = work.view(np.int32), mantissas.view(np.int32)
    bits[experts:] = -1
    worth, chosen = np.empty(m + 1, np.int64), np.empty(m + 1, np.int64)
    before, last = np.full(experts, -1, np.int64), np.full((tried + 1, experts), -1, np.int64)
    scale, earlier = _ONE / np.float32(temperature), 0
    for token in range(tokens):
        continues = token > 0 and sequence[token] == sequence[token - 1]
        earlier = min(earlier + 1, window) if continues else 0
        # This token's probabilities P, what is not stored spread evenly, and its centred logits of norm 1.
        size = m
        while size > 0 and ids[token, size - 1] < 0:
            size -= 1
        for place in range(size):
            listed[place] = logits[token, place] - log_partition[token]
        least = listed[size - 1]
        exponentials(listed[:size], shifted[:size], -87.0)
        scale_32(listed[:size], whole[:size], powers[:size], factors[:size])
        total = _ZERO
        for place in range(size):
            total += listed[place]
        rest = max(_ONE - total, _ZERO) / np.float32(max(experts - size, 1))
        # Who is not stored is no likelier than the last who is; below the second bound the rest is rounding.
        floor = min(np.log(max(rest, _RESOLVED)), least)
        now[:] = rest
        towards[:] = floor
        for place in range(size):
            now[ids[token, place]] = listed[place]
            towards[ids[token, place]] = logits[token, place] - log_partition[token]
        mean = _ZERO
        for expert in range(experts):
            mean += towards[expert]
        mean /= np.float32(experts)
        norm = _ZERO
        for expert in range(experts):
            towards[expert] -= mean
            norm += towards[expert] * towards[expert]
        norm = _ONE / max(np.sqrt(norm), np.float32(1e-20))
        for expert in range(experts):
            towards[expert] *= norm
        # The mixture of those before.
        if earlier == 0:
            mixed[:] = now
        else:
            for back in range(earlier):
                row = (token - 1 - back) % window
                product = _ZERO
                for expert in range(experts):
                    product += towards[expert] * direction[row, expert]
                alike[back] = (product - _ONE) * scale
            exponentials(alike[:earlier], shifted_alike[:earlier], -87.0)
            scale_32(alike[:earlier], whole_alike[:earlier], powers_alike[:earlier], factors_alike[:earlier])
            total = _ZERO
            for back in range(earlier):
                total += alike[back]
            part = _ONE / total
            mixed[:] = _ZERO
            for back in range(earlier):
                row = (token - 1 - back) % window
                weight = alike[back] * part
                for expert in range(experts):
                    mixed[expert] += weight * probability[row, expert]
        row = token % window
        probability[row] = now
        direction[row] = towards
        wanted = min(own[token], size)
        for rank in range(wanted):
            item = ids[token, rank]
            before[item] = token
            load[tried, item] += 1
            kept[tried] += now[item]
            if continues and last[tried, item] == token - 1:
                shared[tried, 0] += 1
            last[tried, item] = token
        entropies[tried] += entropy(now, now.view(np.int32), binary, rest_bits, mantissas)
        for value in range(tried):
            mine = values[value]
            others = _ONE - mine
            for expert in range(experts):
                work[expert] = mine * now[expert] + others * mixed[expert]
            entropies[value] += entropy(work[:experts], bits[:experts], binary, rest_bits, mantissas)
            take(bits, ids[token], min(2 * wanted, m), wanted, worth, chosen)
            same = 0
            for rank in range(wanted):
                item = chosen[rank]
                load[value, item] += 1
                kept[value] += now[item]
                if before[item] == token:
                    same += 1
                if continues and last[value, item] == token - 1:
                    shared[value, 0] += 1
                last[value, item] = token
            if same == wanted and wanted > 0:
                sums[value, 0] += 1
                sums[value, 3] += agreeing[token]
            sums[value, 1] += same
            sums[value, 2] += wanted - same
            if continues:
                shared[value, 1] += wanted
        if continues:
            shared[tried, 1] += wanted
