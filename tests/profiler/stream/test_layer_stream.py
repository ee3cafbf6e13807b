"""``collect_streamed``: the same run as from memory, one layer at a time, interrupted, resumed, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import profiler
import store
from app.cli import main
from moescope.errors import InputError, ModelError, RunError, StoreError
from profiler.collect import collect
from profiler.corpus import Corpus, open_corpus
from profiler.stream import collect_streamed
from profiler.stream.checkpoint import Checkpoint
from profiler.stream.job import StreamJob
from profiler.stream.memory import StreamMemory, require_memory
from profiler.stream.parts import Parts
from profiler.stream.skeleton import build_skeleton
from store.schema import tables
from tests.profiler.capture.tiny import build, tokenizer

FAMILIES = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba")
"""Experts stored one by one under two names, a dense first layer with groups and biases, fused experts, hybrids."""

ORDER = ("name", "layer", "step", "kind", "expert", "domain", "phase", "sequence", "start", "position", "token_id")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and checkpoints."""
    folder = tmp_path_factory.mktemp("stream")
    (folder / "code.txt").write_text("def f(x):\n    return x + 1\n\n" * 20)
    (folder / "english.txt").write_text("It was a bright cold day in April.\n\n" * 20)
    return folder


def checkpoint(folder: Path, family: str, **options: Any) -> Path:
    """A tiny checkpoint in several files."""
    path = folder / "-".join([family, *(f"{name}-{value}" for name, value in options.items())])
    if not path.exists():
        build(family, **options).save_pretrained(path, max_shard_size="150KB")
        tokenizer().save_pretrained(path)
    return path


def corpus(folder: Path, batch_size: int = 4) -> Corpus:
    """Sequences of unequal lengths, so that batches have padding."""
    texts = [folder / "code.txt", folder / "english.txt"]
    return open_corpus(texts, tokenizer=tokenizer(), sequence_length=48, batch_size=batch_size, token_budget=500)


def stream(folder: Path, path: Path, runs: Path, name: str = "streamed", **options: Any) -> store.Run:
    settings = {"level": "routing,activations", "headline": False, "corpus": corpus(folder), **options}
    return store.open_run(collect_streamed(path, name=name, tokenizer=tokenizer(), store=runs, **settings))


def whole(folder: Path, path: Path, runs: Path, **options: Any) -> store.Run:
    settings = {"level": "routing,activations", "headline": False, **options}
    model = profiler.load_model(path, device="cpu")
    return store.open_run(
        collect(model, corpus=corpus(folder), name="whole", tokenizer=tokenizer(), store=runs, **settings)
    )


def assert_same(streamed: store.Run, expected: store.Run) -> None:
    """All tables, the checks with them: what was selected exactly, sums to 1e-6."""
    for table in tables():
        if table == "run":
            continue
        frames = [run.table(table) for run in (streamed, expected)]
        if table == "check":  # memory is another one
            frames = [frame.filter(~pl.col("name").str.contains("memory")) for frame in frames]
        first, second = (frame.sort([name for name in ORDER if name in frame.columns]) for frame in frames)
        if table == "route_chunk":
            exact = pl.exclude("weights", "scale")
            assert_frame_equal(first.select(exact), second.select(exact), check_exact=True)
        assert_frame_equal(first, second, rel_tol=1e-6, abs_tol=1e-9)
    assert streamed.info.model_fingerprint == expected.info.model_fingerprint
    assert (streamed.info.tokens, streamed.info.sequences) == (expected.info.tokens, expected.info.sequences)
    assert streamed.badge.status == expected.badge.status


def interrupt_at(layer: int, batches: int = 1, begins: str = "layer") -> Callable[[store.Progress], None]:
    """Interrupt after so many reports that begin so for a layer (counted from 1), which are its batches."""
    seen: list[str] = []

    def progress(state: store.Progress) -> None:
        if state.detail.startswith(f"{begins} {layer} of"):
            seen.append(state.detail)
        if len(seen) == batches:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_run_is_the_run_from_memory(family: str, folder: Path, tmp_path: Path) -> None:
    path = checkpoint(folder, family)
    told: list[store.Progress] = []
    streamed = stream(folder, path, tmp_path, progress=told.append)
    expected = whole(folder, path, tmp_path)
    assert_same(streamed, expected)
    assert streamed.table("check").filter(name="outputs unchanged")["value"].to_list() == [0.0]
    assert told[0].detail.startswith("peak ")
    assert [state.tokens for state in told] == sorted(state.tokens for state in told)
    assert told[-1].tokens == told[-1].token_budget == expected.info.tokens == 500


def test_16_bits_domains_apart_and_further_levels(folder: Path, tmp_path: Path) -> None:
    path = checkpoint(folder, "qwen3_moe", dtype=torch.bfloat16)
    level = "routing,activations,similarity,moments,attention"
    options: dict[str, Any] = {"level": level, "vectors_per_domain": True, "router_scores": 3}
    streamed = stream(folder, path, tmp_path, scratch=tmp_path / "scratch", **options)
    assert_same(streamed, whole(folder, path, tmp_path, **options))
    assert streamed.info.settings["layer_stream"]["hidden_states"] == "disk"
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("on_disk", [True, False])
def test_interrupted_and_resumed_equals_uninterrupted(
    on_disk: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profiler.capture.session.FLUSH_BYTES", 1)  # shards of unfinished layers, too
    monkeypatch.setattr("profiler.capture.routing.WAITING_TOKENS", 1)
    path = checkpoint(folder, "olmoe")
    expected = whole(folder, path, tmp_path)
    options: dict[str, Any] = {"scratch": tmp_path / "scratch" if on_disk else None}
    with pytest.raises(RunError, match=r"was interrupted after \d+ of 500 tokens.*--resume"):
        stream(folder, path, tmp_path, progress=interrupt_at(3, batches=2), **options)
    live = store.open_run(tmp_path / "streamed.live")
    assert live.progress is not None
    assert live.progress.state == "interrupted"
    assert live.progress.tokens == pytest.approx(500 * 2 / 4)
    assert live.table("route_chunk")["layer"].unique().sort().to_list() == [0, 1, 2]
    state = json.loads((tmp_path / "streamed.live" / "stream" / "layers.json").read_text())
    assert state["layers"] == 2
    with pytest.raises(RunError):
        stream(folder, path, tmp_path, progress=interrupt_at(3), resume=True, **options)
    told: list[store.Progress] = []
    resumed = stream(folder, path, tmp_path, progress=told.append, resume=True, **options)
    assert_same(resumed, expected)
    assert any("repeating layer" in state.detail for state in told) == (not on_disk)
    assert resumed.info.complete


def test_killed_between_layers_and_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, scratch = checkpoint(folder, "deepseek_v3"), tmp_path / "scratch"
    expected = whole(folder, path, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("profiler.stream.session.StreamSession._interrupt", lambda session, error: None)
        with pytest.raises(RunError, match="after 250 of 500 tokens"):
            stream(folder, path, tmp_path, progress=interrupt_at(3, begins="reading layer"), scratch=scratch)
    assert [entry.name for entry in (scratch / "streamed.hidden").iterdir()] == ["layer-0002"]
    told: list[store.Progress] = []
    resumed = stream(folder, path, tmp_path, progress=told.append, resume=True, scratch=scratch)
    assert_same(resumed, expected)
    assert "layer 1 of" not in " ".join(state.detail for state in told)


def test_resuming_with_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError):
        stream(folder, checkpoint(folder, "olmoe"), tmp_path, progress=interrupt_at(2))
    with pytest.raises(InputError, match="begun with another model"):
        stream(folder, checkpoint(folder, "mixtral"), tmp_path, resume=True)
    with pytest.raises(InputError, match="begun with batches of 4"):
        stream(folder, checkpoint(folder, "olmoe"), tmp_path, resume=True, corpus=corpus(folder, batch_size=2))
    model = profiler.load_model(checkpoint(folder, "olmoe"), device="cpu")
    options: dict[str, Any] = {"corpus": corpus(folder), "tokenizer": tokenizer(), "store": tmp_path}
    level = "routing,activations"
    with pytest.raises(InputError, match="begun with --layer-stream: resume it so"):
        collect(model, name="streamed", resume=True, level=level, **options)
    with pytest.raises(StoreError, match="unfinished run"):
        stream(folder, checkpoint(folder, "olmoe"), tmp_path)


def test_one_layer_at_a_time_is_in_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[list[int]] = []
    tell = StreamJob._tell

    def look(job: StreamJob, detail: str = "") -> None:
        stack = job.session.found.stack
        real = [index for index, layer in enumerate(stack) if any(not weight.is_meta for weight in layer.parameters())]
        loaded.append(real)
        model: Any = job.session.model
        assert model.get_output_embeddings().weight.is_meta
        tell(job, detail)

    monkeypatch.setattr(StreamJob, "_tell", look)
    stream(folder, checkpoint(folder, "olmoe"), tmp_path, level="routing")
    assert {tuple(real) for real in loaded} == {(), (0,), (1,), (2,), (3,)}


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_weights_are_those_that_the_library_loads(
    family: str, dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(folder, family, dtype=torch.bfloat16)
    expected = profiler.load_model(path, dtype=dtype, device="cpu").state_dict()
    for straight in (True, False):
        if not straight:
            monkeypatch.setattr(Checkpoint, "_in_place", lambda self, source: False)
        model = build_skeleton(path, dtype=dtype)
        files = Checkpoint(path, model, torch.device("cpu"))
        for _ in range(2):  # memory that was used before holds other values
            files.load(files.names(""))
            actual = model.state_dict()
            assert actual.keys() == expected.keys()
            for name, values in expected.items():
                assert actual[name].dtype == values.dtype, name
                assert torch.equal(actual[name], values), name
            files.unload(files.names(""))
        assert all(weight.is_meta for weight in model.parameters())


def test_the_head_is_no_part(folder: Path) -> None:
    path = checkpoint(folder, "olmoe")
    model = build_skeleton(path)
    files = Checkpoint(path, model, torch.device("cpu"))
    parts = Parts(model, files)
    assert parts.head == ["lm_head.weight"]
    assert parts.outside == ["model.embed_tokens.weight", "model.norm.weight"]
    assert all(name.startswith("model.layers.2.") for name in parts.layer(2))
    assert parts.layer(4) == []


def test_families_whose_layers_hand_on_more_are_refused(folder: Path, tmp_path: Path) -> None:
    path = checkpoint(folder, "zaya")
    with pytest.raises(ModelError, match=r"layer 0 \(ZayaDecoderLayer\) returns a tuple.*leave out --layer-stream"):
        stream(folder, path, tmp_path)


def test_what_cannot_be_streamed_is_refused(folder: Path, tmp_path: Path) -> None:
    path = checkpoint(folder, "olmoe")
    for level in ("gradients", "lookahead", "predictions"):
        with pytest.raises(InputError, match=f"level {level} cannot be recorded with --layer-stream"):
            stream(folder, path, tmp_path, level=level)
    with pytest.raises(ModelError, match=r"one layer at a time takes .* the memory limit is 0\.0977 GiB"):
        stream(folder, path, tmp_path, memory_limit="100MiB")
    with pytest.raises(ModelError, match="is no folder"):
        stream(folder, Path("some/hub-id"), tmp_path)
    packed = tmp_path / "packed"
    packed.mkdir()
    config = json.loads((path / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=r"is quantized \(fp8.*\).*leave out --layer-stream"):
        stream(folder, packed, tmp_path)
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no safetensors"):
        stream(folder, packed, tmp_path)
    assert not list(tmp_path.glob("*.live"))


def test_damaged_checkpoints_are_one_line(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "damaged"
    build("olmoe").save_pretrained(path)
    file = path / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if "layers.1.mlp.gate." not in name}, file)
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.gate\.weight"):
        stream(folder, path, tmp_path)
    save_file({**weights, "model.norm.weight": torch.ones(7)}, file)
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[7\], the configuration says"):
        stream(folder, path, tmp_path)
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(ModelError, match=r"lies outside the file.*damaged") as caught:
        stream(folder, path, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_limit_decides_where_hidden_states_wait() -> None:
    memory = StreamMemory(process=10, outside=20, layer=30, batch=5, recording=5, hidden=100)
    assert memory.peak(on_disk=True) == 70
    assert require_memory(memory, 170, on_disk=False) is False
    assert require_memory(memory, 169, on_disk=False) is True
    assert require_memory(memory, 1 << 40, on_disk=True) is True
    with pytest.raises(ModelError, match="one layer at a time takes"):
        require_memory(memory, 69, on_disk=True)


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(folder, "olmoe")
    words = ["collect", str(path), "--data", str(folder / "code.txt"), "--tokens", "300", "--sequence-length", "48"]
    words += ["--store", str(tmp_path), "--name", "line", "--json"]
    assert main([*words, "--layer-stream", "--level", "routing", "--memory-limit", "8GiB"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out.splitlines()[-1])
    assert (answer["tokens"], answer["capture"]) == (300, "valid")
    assert "layer 4 of 4" in captured.err
    for wrong, message in (
        (["--scratch", "there"], "--scratch keeps hidden states of --layer-stream"),
        (["--layer-stream", "--generate", "5"], "--generate needs the whole model"),
        (["--layer-stream", "--level", "gradients"], "a backward needs all layers"),
    ):
        assert main([*words, "--name", "other", *wrong]) == 2
        assert message in capsys.readouterr().err
