"""``profiler.watch``: what is counted in forwards and generations, with padding and errors, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from polars.testing import assert_frame_equal

import profiler
import store
from moescope.errors import CaptureError, InputError, ModelError, StoreError
from profiler.capture import tap
from profiler.recorders.load import LoadRecorder
from tests.profiler.capture.tiny import CONFIGS, FAST, batch, build, output_of, recorded_calls, tokenizer

PLACES = ("channel", "sequence", "position", "median_there")


def watched(
    model: Any, folder: Path, *batches: dict[str, torch.Tensor], name: str = "tiny", **options: Any
) -> store.Run:
    with torch.no_grad(), profiler.watch(model, store=folder, name=name, **options) as session:
        for inputs in batches:
            model(**inputs)
    assert session.path is not None
    return store.open_run(session.path)


def generating(family: str, **changes: Any) -> Any:
    """A model that generates until it is told to stop."""
    model = build(family, **changes)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def check(run: store.Run, name: str) -> list[dict[str, Any]]:
    return run.table("check").filter(pl.col("name") == name).to_dicts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAST)
def test_outputs_are_bit_identical_and_the_run_is_valid(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = build(family, dtype=dtype), batch()
    hooks = hooks_of(model)
    with torch.no_grad():
        before = output_of(model(**inputs))
        with profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
            during = output_of(model(**inputs))
        after = output_of(model(**inputs))
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert hooks_of(model) == hooks
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    assert run.info.dtype == str(dtype).removeprefix("torch.")
    assert run.info.backend == "grouped_mm"
    assert run.info.model_type == model.config.model_type


@pytest.mark.parametrize("family", FAST)
def test_gate_weights_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model, inputs = build(family), batch()
    with torch.no_grad(), recorded_calls(model) as calls:
        model(**inputs)
    trace = watched(model, tmp_path, inputs).selections()
    real = inputs["attention_mask"].reshape(-1).bool()
    lengths = np.arange(trace.ids.shape[2])[None] < trace.lengths[:, None]
    for axis, entry in enumerate(calls):
        weights = entry.weights[0][real].float().sort(1, descending=True).values.numpy()
        # Stored in 8 bits: wrong by at most half a step of 1/255 of the largest of its chunk.
        assert_allclose(trace.weights[axis][lengths], weights, atol=weights.max() / 509)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAST)
def test_padding_counts_nothing(family: str, padding: str, tmp_path: Path) -> None:
    model, inputs = build(family), batch(padding=padding)
    run = watched(model, tmp_path, inputs, level="activations")
    singles = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        singles.append({"input_ids": ids[mask][None]})
    alone = watched(model, tmp_path, *singles, name="alone", level="activations")
    assert run.info.tokens == alone.info.tokens == int(inputs["attention_mask"].sum())
    assert_array_equal(run.selections().ids, alone.selections().ids)
    for table in ("expert_load", "expert_output", "router_load", "residual"):
        # Where a maximum stood is left out: two tokens may be equally large but for rounding.
        expected = alone.table(table)
        columns = [name for name in expected.columns if not name.startswith("output_max_") and name not in PLACES]
        frames = (frame.select(columns) for frame in (run.table(table), expected))
        assert_frame_equal(*frames, check_row_order=False, rel_tol=2e-4, abs_tol=1e-4)


@pytest.mark.parametrize("family", FAST)
def test_generation_equals_generating_each_sequence_alone(family: str, tmp_path: Path) -> None:
    model, inputs = generating(family), batch(padding="left")
    runs = {}
    for name, batches in (("together", [inputs]), ("alone", list(_rows(inputs)))):
        with torch.no_grad(), profiler.watch(model, store=tmp_path, name=name) as session:
            for part in batches:
                model.generate(**part, max_new_tokens=5, do_sample=False)
        assert session.path is not None
        runs[name] = store.open_run(session.path)
    together, alone = runs["together"], runs["alone"]
    # The last generated token is never fed, so it is never routed.
    assert together.table("sequence")["tokens"].to_list() == [16, 13, 10]
    assert together.table("sequence")["prompt_tokens"].to_list() == [12, 9, 6]
    assert_array_equal(together.selections().ids, alone.selections().ids)
    columns = ["layer", "step", "expert", "phase", "tokens", "first_choices", "first_positions"]
    load = together.table("expert_load").select(columns)
    assert_frame_equal(load, alone.table("expert_load").select(columns), check_row_order=False)
    decoded = load.filter((pl.col("phase") == "decode") & (pl.col("layer") == together.layers[0].layer))
    assert decoded["tokens"].sum() == 3 * 4 * together.layers[0].top_k


def _rows(inputs: dict[str, torch.Tensor]) -> Any:
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        yield {"input_ids": ids[mask][None], "attention_mask": mask[mask][None].long()}


def test_finished_rows_of_generate_are_left_out(tmp_path: Path) -> None:
    model, inputs = generating("olmoe"), batch(padding="left")
    with torch.no_grad():
        free = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    # Whatever the second row says third becomes the end token.
    model.generation_config.eos_token_id = end = int(free[1, 12 + 2])
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny") as session:
        full = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert session.path is not None
    run = store.open_run(session.path)
    generated = full[:, 12:]
    ends = [row.tolist().index(end) if end in row else generated.shape[1] - 1 for row in generated]
    prompts = run.table("sequence")["prompt_tokens"].to_list()
    assert run.table("sequence")["tokens"].to_list() == [p + e for p, e in zip(prompts, ends, strict=True)]
    assert ends[1] <= 2


def test_a_loop_of_ones_own_with_a_cache_appends(tmp_path: Path) -> None:
    model = build("mixtral")
    ids = batch(2, 6, padding="none")["input_ids"]
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", tokenizer=tokenizer()) as session:
        output = model(input_ids=ids[:, :4], use_cache=True)
        for place in (4, 5):
            output = model(input_ids=ids[:, place : place + 1], past_key_values=output.past_key_values)
        model(input_ids=ids)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.table("sequence")["tokens"].to_list() == [6, 6, 6, 6]
    assert run.table("sequence")["prompt_tokens"].to_list() == [4, 4, 6, 6]
    trace = run.selections()
    assert_array_equal(trace.ids[:, :2], trace.ids[:, 2:])
    text = run.sequence_text(1)
    assert text is not None
    assert_array_equal(text.token_ids, ids[1])


def test_labels_reach_the_tables(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", domain="other") as session:
        session.label(domains=["code", "german", "code"], sequences=[7, 3, 5], sources=["a", "b", "c"])
        model(**inputs)
        model(**inputs)
    assert session.path is not None
    run = store.open_run(session.path)
    table = run.table("sequence").sort("sequence")
    assert table["sequence"].to_list() == [3, 5, 7, 8, 9, 10]
    assert table["domain"].to_list() == ["german", "code", "code", "other", "other", "other"]
    assert table["source"].to_list()[:3] == ["b", "c", "a"]
    tokens = run.table("router_load").filter(pl.col("layer") == 0).select("domain", "tokens").sort("domain")
    assert dict(tokens.iter_rows()) == {"code": 12 + 6, "german": 9, "other": 27}
    code = run.selections(domain="code")
    assert_array_equal(code.sequences, [5, 7])


def test_sequences_lie_on_axes_of_the_caller(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", flush_seconds=0.0) as session:
        session.label(timestep=torch.tensor([0, 250, 999]), guidance=4.0)
        cache = model(**inputs, use_cache=True).past_key_values
        ids = inputs["input_ids"][:, :1]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)  # goes on with the labelled rows
        session.label(guidance=None, prompt="<b>two\n words")
        model(**inputs)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.table("sequence_label").sort("axis", "sequence").rows() == [
        *((number, "guidance", "4") for number in range(3)),
        *((number, "prompt", "<b>two words") for number in range(3, 6)),
        *((number, "timestep", value) for number, value in enumerate(("0", "250", "999"))),
    ]


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"position": 3}, "axis 'position' has a meaning of its own"),
        ({"two words": 3}, "axis 'two words' is no name"),
        ({"timestep": [1, float("nan"), 2]}, "a value of axis 'timestep' is float 'nan'"),
        ({"timestep": [1, 2]}, "label\\(\\) names 2 values of axis 'timestep', but the batch has 3 rows"),
        ({"note": "x" * 201}, "a value of axis 'note' has 201 characters"),
    ],
)
def test_what_is_no_axis_is_refused(tmp_path: Path, axes: dict[str, Any], said: str) -> None:
    model = build("olmoe")
    with (
        pytest.raises(InputError, match=said),
        torch.no_grad(),
        profiler.watch(model, store=tmp_path, name="tiny") as session,
    ):
        session.label(**axes)
        model(**batch())


def test_labels_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    model = build("olmoe")
    with (
        pytest.raises(InputError, match="names 3 sequences, 2 domains"),
        torch.no_grad(),
        profiler.watch(model, store=tmp_path, name="tiny") as session,
    ):
        session.label(domains=["a", "b"])
        model(**batch())


def test_hooks_are_gone_after_an_error_and_the_shards_stay(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()
    hooks = hooks_of(model)
    with pytest.raises(RuntimeError, match="mine"), profiler.watch(model, store=tmp_path, name="tiny"), torch.no_grad():
        model(**inputs)
        raise RuntimeError("mine")
    assert hooks_of(model) == hooks
    assert not tap._watchers
    assert not tap._installed
    live = store.open_run(tmp_path / "tiny.live")
    assert live.progress is not None
    assert live.progress.state == "interrupted"
    assert live.table("sequence")["tokens"].sum() == int(inputs["attention_mask"].sum())
    run = watched(model, tmp_path, inputs, resume=True)
    assert run.table("sequence")["sequence"].to_list() == [0, 1, 2, 3, 4, 5]


def test_a_forward_that_fails_half_way_counts_nothing(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()

    def fail(*_: Any) -> None:
        raise ValueError("broken layer")

    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="broken", level="activations") as session:
        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="broken layer"):
            model(**inputs)
        handle.remove()
        model(**inputs)
    assert session.path is not None
    broken, whole = store.open_run(session.path), watched(model, tmp_path, inputs, level="activations")
    for table in ("expert_load", "expert_output", "neuron_activation", "residual", "sequence", "router_load"):
        assert_frame_equal(broken.table(table), whole.table(table), check_row_order=False)
    assert broken.badge.status == "valid"


def test_an_interrupt_within_a_forward_counts_nothing_and_the_next_forward_counts(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        handle = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        model(**inputs)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.table("sequence")["sequence"].to_list() == [0, 1, 2]
    assert run.table("expert_output")["tokens"].sum() == 4 * 27 * 2


def test_an_interrupt_between_recorders_leaves_the_rest_to_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build("olmoe"), batch()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        torch.no_grad(),
        profiler.watch(model, store=tmp_path, name="tiny") as session,
    ):
        model(**inputs)
        session.flush()
        monkeypatch.setattr(LoadRecorder, "update", interrupt)
        for _ in range(100):
            model(**inputs)
    monkeypatch.undo()
    live = store.open_run(tmp_path / "tiny.live")
    # The load of some forwards is missing, so that nothing of them is kept: not even that their sequences were seen.
    assert live.table("sequence")["sequence"].to_list() == [0, 1, 2]
    run = watched(model, tmp_path, inputs, resume=True)
    assert run.table("sequence")["sequence"].to_list() == [0, 1, 2, 3, 4, 5]
    assert run.table("expert_load")["tokens"].sum() == run.info.tokens * 2 * 4


def test_two_threads_at_once_are_an_error(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()
    found: list[BaseException] = []

    def second() -> None:
        try:
            model(**inputs)
        except CaptureError as error:
            found.append(error)

    def beside(*_: Any) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny"):
        handle = model.model.layers[2].register_forward_pre_hook(beside)
        model(**inputs)
        handle.remove()
    assert "two forwards of the watched model run at once" in str(found[0])


def test_nan_in_the_router_is_a_finding_and_the_run_finishes(tmp_path: Path) -> None:
    model = build("olmoe")
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight[3] = float("nan")
    run = watched(model, tmp_path, batch(), level="activations")
    assert run.badge.status == "invalid"
    failed = [row for row in check(run, "router logits finite") if row["status"] == "fail"]
    assert failed[0]["layer"] == 2
    assert failed[0]["value"] == 27
    load = run.table("router_load").filter(pl.col("layer") == 2)
    assert load["nonfinite_tokens"].to_list() == [27]
    assert load["logit_tokens"].to_list() == [0]
    first = run.table("expert_output").filter(pl.col("layer") == 0)
    assert first["norm_sum"].is_finite().all()


def test_a_sequence_of_only_padding_is_noted_and_nothing_else_is_lost(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch(padding="right")
    inputs["attention_mask"][1] = 0
    run = watched(model, tmp_path, inputs, level="activations")
    assert run.table("sequence")["tokens"].to_list() == [12, 0, 6]
    assert check(run, "empty sequences")[0]["value"] == 1
    assert run.table("router_load")["tokens"].to_list() == [18] * 4
    only = {"input_ids": inputs["input_ids"][:1], "attention_mask": torch.zeros_like(inputs["input_ids"][:1])}
    empty = watched(model, tmp_path, only, inputs, name="empty", level="activations")
    assert empty.info.tokens == 18


def test_a_mask_that_is_not_2d_is_a_finding(tmp_path: Path) -> None:
    model = build("olmoe")
    ids = batch(2, 6, padding="none")["input_ids"]
    mask = torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min)
    run = watched(model, tmp_path, {"input_ids": ids, "attention_mask": mask})
    assert run.badge.status == "warning"
    assert "mask known" in run.badge.reason
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="told") as session:
        known = torch.ones(2, 6, dtype=torch.int64)
        known[1, 4:] = 0
        session.label(mask=known)
        model(input_ids=ids, attention_mask=mask)
    assert session.path is not None
    assert store.open_run(session.path).info.tokens == 10


def test_training_counts_once_and_gradients_are_the_same(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch(padding="none")
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        for watching in (False, True):
            model.zero_grad()
            if not watching:
                model(**inputs).logits.square().sum().backward()
                gradients.append([parameter.grad.clone() for parameter in model.parameters()])
                continue
            with profiler.watch(model, store=tmp_path, name=f"train{checkpointing}", level="activations") as session:
                model(**inputs).logits.square().sum().backward()
            for parameter, expected in zip(model.parameters(), gradients[-1], strict=True):
                assert torch.equal(parameter.grad, expected)
            assert session.path is not None
            run = store.open_run(session.path)
            assert run.badge.status == "valid", run.badge.reason
            assert run.table("router_load")["tokens"].to_list() == [36] * 4


def test_a_compiled_model_is_watched(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch(padding="none")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**inputs)
        with profiler.watch(compiled, store=tmp_path, name="tiny") as session:
            compiled(**inputs)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    assert run.info.tokens == 36


@pytest.mark.parametrize("backend", ["eager", "batched_mm"])
def test_other_backends_give_the_same_statistics(backend: str, tmp_path: Path) -> None:
    model, inputs = build("qwen3_moe"), batch()
    expected = watched(model, tmp_path, inputs, level="activations")
    model.set_experts_implementation(backend)
    with torch.no_grad():
        bare = model(**inputs).logits
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name=backend, level="activations") as session:
        assert torch.equal(model(**inputs).logits, bare)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.info.backend == backend
    assert run.badge.status == "valid", run.badge.reason
    for table in ("expert_output", "neuron_activation"):
        found = run.table(table)
        columns = [name for name, kind in found.schema.items() if kind == pl.Float64]
        assert_frame_equal(found.select(columns), expected.table(table).select(columns), rel_tol=1e-4)
    assert model.get_experts_implementation() == {"": backend}


def test_generation_with_a_static_cache_says_that_padding_is_unknown(tmp_path: Path) -> None:
    model, inputs = generating("olmoe"), batch(padding="left")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny") as session:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "warning"
    assert check(run, "mask known")[0]["value"] == 3


def test_generation_without_cache_says_that_it_repeats(tmp_path: Path) -> None:
    model, inputs = generating("olmoe"), batch(padding="left")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny") as session:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "warning"
    assert check(run, "text fed once")[0]["value"] == 2


def test_rejected_drafts_are_a_finding(tmp_path: Path) -> None:
    model, inputs = generating("olmoe"), batch(1, padding="none")
    assistant = generating("olmoe", num_hidden_layers=1)
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny") as session:
        model.generate(**inputs, max_new_tokens=6, do_sample=False, assistant_model=assistant)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "warning"
    assert check(run, "tokens kept")[0]["value"] > 0
    sequence = run.table("sequence").to_dicts()[0]
    assert sequence["prompt_tokens"] <= sequence["tokens"] == 12 + 6 - 1


def test_chunked_prefill_is_prompt(tmp_path: Path) -> None:
    model, inputs = generating("olmoe"), batch(padding="left")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny") as session:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, prefill_chunk_size=5)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    assert run.table("sequence")["prompt_tokens"].to_list() == [12, 9, 6]


def test_offloaded_weights_are_read_where_they_run(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build("qwen3_moe"), batch()
    with torch.no_grad():
        bare = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        assert torch.equal(model(**inputs).logits, bare)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    assert {row["status"] for row in check(run, "output recomputed")} == {"pass"}


def test_a_vision_language_model_is_watched_in_its_text_part(tmp_path: Path) -> None:
    import transformers

    text = CONFIGS["qwen3_vl_moe_text"]["config"]
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_position_embeddings": 64}
    vision |= {"out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model, inputs = transformers.Qwen3VLMoeForConditionalGeneration._from_config(config).eval(), batch(padding="left")
    with torch.no_grad():
        bare = model(**inputs).logits
    with (
        torch.no_grad(),
        profiler.watch(model, store=tmp_path, name="tiny", level="activations", tokenizer=tokenizer()) as session,
    ):
        assert torch.equal(model(**inputs).logits, bare)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    assert run.info.num_layers == run.table("residual")["layer"].n_unique() == text["num_hidden_layers"]
    assert run.table("sequence")["tokens"].to_list() == [12, 9, 6]
    found = run.sequence_text(1)  # ids come from the outer model, which embeds them before the text part
    assert found is not None
    assert_array_equal(found.token_ids, inputs["input_ids"][1, 3:])


def test_the_token_budget_stops_recording_but_not_the_model(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch(padding="none")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", token_budget=40) as session:
        for _ in range(4):
            model(**inputs)
    assert session.budget_reached
    assert session.path is not None
    assert store.open_run(session.path).info.tokens == 72


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM has no MoE layers: it is a dense model"):
        profiler.watch(transformers.LlamaForCausalLM(config), store=tmp_path, name="dense")
    assert not (tmp_path / "dense.live").exists()


def test_an_unknown_mixture_is_refused_by_name() -> None:
    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = torch.nn.Linear(4, 3), torch.nn.ModuleList(Expert() for _ in range(3))

    class Stacked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = (torch.nn.Parameter(torch.zeros(3, 4, 8)) for _ in range(2))

    class OtherBlock(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.mixture = torch.nn.Linear(4, 3), Stacked()

    for block, pattern in (
        (Block, r"layer 1, layers\.1\.experts \(ModuleList\)"),
        (OtherBlock, r"layer 1, .*\(Stacked\)"),
    ):
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), block()])
        with pytest.raises(ModelError, match=pattern + " cannot be watched"):
            profiler.find_moe_layers(model)


def test_packed_experts_are_refused_at_activations_and_watched_at_routing(tmp_path: Path) -> None:
    model = build("olmoe")
    layer = model.model.layers[1].mlp.experts
    layer.down_proj.data = layer.down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"needs plain weights, but .*layers\.1.* keeps them packed"):
        profiler.watch(model, store=tmp_path, name="tiny", level="activations")


def test_expert_parallel_models_are_refused() -> None:
    model = build("olmoe")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts .* runs expert-parallel"):
        profiler.find_moe_layers(model)


def test_inference_mode_and_no_grad_may_alternate(tmp_path: Path) -> None:
    model, inputs = build("qwen2_moe"), batch()
    expected = watched(model, tmp_path, inputs, inputs, level="activations", flush_seconds=1e9)
    with profiler.watch(model, store=tmp_path, name="mixed", level="activations") as session:
        with torch.inference_mode():
            model(**inputs)
        with torch.no_grad():
            model(**inputs)
    assert session.path is not None
    run = store.open_run(session.path)
    for table in ("expert_load", "expert_output", "neuron_activation", "residual"):
        assert_frame_equal(run.table(table), expected.table(table))


def test_selections_with_a_bias_are_not_the_largest_logits(tmp_path: Path) -> None:
    model, inputs = build("deepseek_v3"), batch(padding="none")
    with torch.no_grad(), recorded_calls(model) as calls:
        model(**inputs)
    trace = watched(model, tmp_path, inputs).selections()
    assert [key for key, _ in trace.layers] == [1, 2, 3]  # the dense first layer has no place in the trace
    differ = 0
    for axis, entry in enumerate(calls):
        ids = trace.ids[axis].reshape(-1, entry.layer.top_k)
        differ += (np.sort(ids) != entry.logits[0].topk(entry.layer.top_k).indices.sort().values.numpy()).any(1).sum()
        assert_array_equal(np.sort(ids), entry.ids[0].sort().values.numpy())
    assert differ > 0


def test_level_name_and_context_errors(tmp_path: Path) -> None:
    model = build("olmoe")
    with pytest.raises(InputError, match="level 'routng' is not known: use a comma list of routing, activations"):
        profiler.watch(model, store=tmp_path, name="tiny", level="routng")
    with (
        pytest.raises(CaptureError, match="no forward of the watched model"),
        profiler.watch(model, store=tmp_path, name="tiny"),
    ):
        pass
    run = watched(model, tmp_path, batch())
    with pytest.raises(StoreError, match="already has a run"), profiler.watch(model, store=tmp_path, name=run.name):
        pass
    with (
        pytest.raises(CaptureError, match="no forward"),
        profiler.watch(model, store=tmp_path, name="one"),
        pytest.raises(CaptureError, match="being watched already"),
        profiler.watch(model, store=tmp_path, name="two"),
    ):
        pass
    assert not tap._watchers
    assert not (tmp_path / "two.live").exists()


def test_other_models_pass_straight_through(tmp_path: Path) -> None:
    model, other = build("olmoe"), build("mixtral")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        other(**batch())
        model(**batch())
    assert session.path is not None
    assert store.open_run(session.path).info.tokens == 27


def test_decoder_and_full_model_see_the_same_tokens(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch(padding="left")
    run = watched(model, tmp_path, inputs)
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="base") as session:
        model.model(**inputs)
    assert session.path is not None
    assert_array_equal(store.open_run(session.path).selections().ids, run.selections().ids)
