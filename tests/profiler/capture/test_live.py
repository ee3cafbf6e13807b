"""``watch`` around a server: requests from many threads, one worker, live reading, and leaving in the midst of work."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from numpy.testing import assert_array_equal

import profiler
import store
from moescope.errors import CaptureError
from tests.profiler.capture.tiny import batch, build, tokenizer

PROMPTS = {"code": "def f(x):", "english": "It was a bright cold day", "french": "Il fait beau"}
NEW = 4


class Server:
    """Answers prompts one after the other in a thread of its own, as the worker of a web server does."""

    def __init__(self, model: Any, session: profiler.WatchSession) -> None:
        self._model, self._session, self._words = model, session, tokenizer()
        self._requests: queue.Queue[tuple[str, str, queue.Queue[str]] | None] = queue.Queue()
        self._worker = threading.Thread(target=self._work)
        self._worker.start()

    def ask(self, domain: str, text: str) -> str:
        """The answer to a prompt; called from any thread."""
        reply: queue.Queue[str] = queue.Queue()
        self._requests.put((domain, text, reply))
        return reply.get(timeout=60)

    def stop(self) -> None:
        """Answer what has been asked, and end."""
        self._requests.put(None)
        self._worker.join(timeout=60)

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            domain, text, reply = request
            inputs = self._words(text, return_tensors="pt", return_token_type_ids=False)
            self._session.label(domains=[domain], sources=[text])
            with torch.no_grad():
                fed = self._model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            reply.put(self._words.decode(fed[0, inputs["input_ids"].shape[1] :]))


def speaking() -> Any:
    model = build("olmoe")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def test_a_server_is_watched_while_it_answers(tmp_path: Path) -> None:
    model, answers = speaking(), {}
    with profiler.watch(model, store=tmp_path, name="served", tokenizer=tokenizer(), flush_seconds=0.0) as session:
        server = Server(model, session)
        clients = [
            threading.Thread(target=lambda pair=pair: answers.__setitem__(pair[1], server.ask(*pair)))
            for pair in list(PROMPTS.items()) * 2
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join(timeout=60)
        live = store.open_run(tmp_path / "served.live")
        assert live.progress is not None and live.progress.state == "collecting"
        assert len(live.table("sequence")) > 0
        server.stop()
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    table = run.table("sequence")
    assert sorted(table["domain"]) == sorted([*PROMPTS] * 2)
    assert (table["tokens"] - table["prompt_tokens"]).to_list() == [NEW - 1] * len(table)
    for row in table.iter_rows(named=True):
        text = run.sequence_text(row["sequence"])
        assert text is not None
        said = b"".join(text.pieces).decode()
        assert said.startswith(row["source"]) and PROMPTS[row["domain"]] == row["source"]
        # The last token of an answer is fed to nothing.
        assert answers[row["source"]].startswith(said[len(row["source"]) :])
    decoded = run.table("router_load").filter(layer=0, phase="decode")
    assert decoded["tokens"].sum() == len(table) * (NEW - 1)


def test_two_workers_are_refused_and_one_goes_on(tmp_path: Path) -> None:
    model, inside, go_on = build("olmoe"), threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def hold(*_: Any) -> None:
        if threading.current_thread() is first:
            inside.set()
            go_on.wait(timeout=60)

    def work() -> None:
        try:
            with torch.no_grad():
                model(**batch())
        except CaptureError as error:
            failures.append(error)
            go_on.set()

    handle = model.model.layers[1].register_forward_pre_hook(hold)
    first, second = threading.Thread(target=work), threading.Thread(target=work)
    with profiler.watch(model, store=tmp_path, name="two") as session:
        first.start()
        assert inside.wait(timeout=60)
        second.start()
        first.join(timeout=60)
        second.join(timeout=60)
        handle.remove()
        with torch.no_grad():
            model(**batch())
    assert [str(error) for error in failures] == [
        "two forwards of the watched model run at once: profile with one worker and thread"
    ]
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.info.tokens == 2 * int(batch()["attention_mask"].sum())
    assert_array_equal(run.selections().ids[:, :3], run.selections().ids[:, 3:])


def test_leaving_in_the_midst_of_a_forward_counts_it_not(tmp_path: Path) -> None:
    model, inside, go_on = build("olmoe"), threading.Event(), threading.Event()
    with torch.no_grad():
        expected = model(**batch()).logits
    outputs: list[torch.Tensor] = []

    def hold(*_: Any) -> None:
        inside.set()
        go_on.wait(timeout=60)

    def work() -> None:
        with torch.no_grad():
            outputs.append(model(**batch()).logits)

    worker = threading.Thread(target=work)
    with profiler.watch(model, store=tmp_path, name="left", level="activations") as session:
        with torch.no_grad():
            model(**batch())
        model.model.layers[2].register_forward_pre_hook(hold)
        worker.start()
        assert inside.wait(timeout=60)
    go_on.set()
    worker.join(timeout=60)
    assert torch.equal(outputs[0], expected)
    assert session.path is not None
    run = store.open_run(session.path)
    tokens = int(batch()["attention_mask"].sum())
    assert run.info.tokens == tokens
    assert run.table("expert_load").group_by("layer").agg(pl.col("tokens").sum())["tokens"].unique().to_list() == [
        tokens * run.layers[0].top_k
    ]
    assert run.badge.status == "valid", run.badge.reason


def test_the_budget_ends_the_recording_and_not_the_server(tmp_path: Path) -> None:
    model = speaking()
    with profiler.watch(model, store=tmp_path, name="short", token_budget=20) as session:
        server = Server(model, session)
        for _ in range(4):
            server.ask("english", PROMPTS["english"])
        assert session.budget_reached
        server.stop()
    assert session.path is not None
    run = store.open_run(session.path)
    assert 20 <= run.info.tokens <= 20 + len(PROMPTS["english"])


def test_an_error_of_the_server_is_its_own(tmp_path: Path) -> None:
    model = build("olmoe")
    with pytest.raises(ZeroDivisionError), profiler.watch(model, store=tmp_path, name="broken"), torch.no_grad():
        model(**batch())
        1 / 0  # noqa: B018
    live = store.open_run(tmp_path / "broken.live")
    assert live.progress is not None and live.progress.state == "interrupted"
    assert live.table("sequence")["tokens"].sum() == int(batch()["attention_mask"].sum())
