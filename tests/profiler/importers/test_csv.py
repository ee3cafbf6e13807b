"""CSV traces and counts, against the arrays that were written."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moescope.errors import ImportFileError
from profiler.importers import csv as reader
from tests.profiler.importers.traces import Arrays, arrays, bring_in, left_behind, selections_of

HEADER = "token,layer,slot,expert,weight\n"


def _lines(trace: Arrays, *, sequences: bool) -> str:
    lines = []
    for sequence, (low, high) in enumerate(zip(trace.offsets[:-1], trace.offsets[1:], strict=True)):
        for token in range(low, high):
            for layer, (ids, weights) in enumerate(zip(trace.experts[token], trace.weights[token], strict=True)):
                for slot, (expert, weight) in enumerate(zip(ids, weights, strict=True)):
                    start = f"{sequence},{token - low}" if sequences else f"{token}"
                    lines.append(f"{start},{layer},{slot},{expert},{weight}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("batch", [64, 1 << 24])
@pytest.mark.parametrize("sequences", [False, True])
def test_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, sequences: bool) -> None:
    monkeypatch.setattr(reader, "BATCH_BYTES", batch)
    trace = arrays(lengths=(3, 20, 1))
    file = tmp_path / "t.csv"
    file.write_text(("sequence," if sequences else "") + HEADER + _lines(trace, sequences=sequences))
    run = bring_in("csv", file, tmp_path / "runs", num_experts=6)
    assert run.table("sequence")["tokens"].to_list() == ([3, 20, 1] if sequences else [24])
    for layer in range(3):
        read = run.layer_selections(layer=layer, weights=True)
        np.testing.assert_array_equal(read.ids, trace.experts[:, layer])
        assert read.weights is not None
        np.testing.assert_allclose(read.weights, trace.weights[:, layer], atol=1 / 500)


def test_columns_by_number_other_columns_and_gz(tmp_path: Path) -> None:
    trace = arrays(lengths=(4,))
    body = _lines(trace, sequences=False)
    (tmp_path / "bare.csv").write_text(body)
    with gzip.open(tmp_path / "packed.csv.gz", "wt") as stream:
        stream.write("note," + HEADER + "".join(f'"x",{line}\n' for line in body.splitlines()))
    for number, name in enumerate(("bare.csv", "packed.csv.gz")):
        run = bring_in("csv", tmp_path / name, tmp_path / "runs", name=f"n{number}", num_experts=6)
        np.testing.assert_array_equal(run.layer_selections(layer=2).ids, trace.experts[:, 2])


def test_counts(tmp_path: Path) -> None:
    trace = arrays(lengths=(30,))
    pairs = [(layer, expert) for token in trace.experts.tolist() for layer, ids in enumerate(token) for expert in ids]
    file = tmp_path / "t.csv"
    file.write_text("layer,expert\n" + "".join(f"{layer},{expert}\n" for layer, expert in pairs))
    run = bring_in("csv", file, tmp_path / "runs", num_experts=6, top_k=2)
    assert selections_of(run) == Counter(pairs)
    assert not run.has_trace and run.info.tokens == 30
    assert {"trace", "order", "weights", "text"} <= set(run.omissions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''"),
        ("a,b\n1,2\n", "csv takes the columns"),
        ("1,2,3\n", "csv takes the columns"),
        (HEADER, "has no line with a selection"),
        (HEADER + "0,0,0,9,1\n", "expert 9 is out of range"),
        (HEADER + "0,0,0,-1,1\n", "expert -1 is out of range"),
        (HEADER + "0,-1,0,1,1\n", "layers run from -1"),
        (HEADER + "0,0,-1,1,1\n", "slots run from -1"),
        (HEADER + "0,0,0,1\n", "does not match number of columns"),
        (HEADER + "0,0,0,one,1\n", "could not parse"),
        (HEADER + "0,0,0,1,nan\n", "negative, infinite or NaN"),
        (HEADER + "0,0,0,1,1\n0,0,0,2,1\n", "a slot of a token comes twice"),
        (HEADER + "0,0,0,1,1\n2,0,0,2,1\n", "token 1 of sequence 0 is missing"),
        ("layer,expert\n0,1\n0,\n", "empty field"),
        ("layer,expert\n0,99\n", "expert 99 is out of range"),
        ("\x00\xff", "csv takes the columns|no text file"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ImportFileError, match=message) as caught:
        bring_in("csv", tmp_path / "t.csv", tmp_path / "runs", num_experts=6)
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path / "runs") == []
