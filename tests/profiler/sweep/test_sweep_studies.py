"""Contrast in numpy from two plain forwards, rerouting with a second optimizer's hooks, search against generation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.routing import Bias, rerouted
from moescope.errors import CorpusError, InputError, ModelError
from profiler.capture.discovery import find_moe_layers
from profiler.corpus import TokenBatch
from profiler.evaluation.generation import generate
from profiler.sweep.contrast import Contrast, contrast
from profiler.sweep.items import Item, items_of_text, read_items
from profiler.sweep.rerouting import Rerouting, rerouting, work
from profiler.sweep.search import Search, search
from tests.profiler.capture.tiny import tokenizer
from tests.profiler.sweep.by_router import batches, best, choosing, logits_of, olmoe, with_k


@pytest.fixture(scope="module")
def model() -> Any:
    return olmoe()


def test_contrast_is_the_formula(model: Any) -> None:
    alpha, beta = 0.2, 0.7
    found = contrast(model, batches(), rank=2, betas=[0.3, beta], alpha=alpha)
    names = ("kl", "agreement", "candidates", "right", "base_right", "loss", "base_loss")
    figures: dict[str, list[float]] = {name: [] for name in names}

    def second(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = logits.topk(2, -1).indices[:, 1:]
        return torch.ones(ids.shape), ids

    def softmax(z: np.ndarray) -> np.ndarray:
        powers = np.exp(z - z.max())
        return powers / powers.sum()

    for batch in batches():
        strong = logits_of(model, batch).numpy()
        with choosing(model, second):
            weak = logits_of(model, batch).numpy()
        for row, place in zip(*np.nonzero(batch.attention_mask[:, 1:]), strict=True):
            s, w, token = strong[row, place], weak[row, place], batch.input_ids[row, place + 1]
            p, q = softmax(s), softmax(w)
            figures["kl"].append(float((p * np.log(p / q)).sum()))
            figures["agreement"].append(s.argmax() == w.argmax())
            inside = s >= s.max() + np.log(alpha)
            z = np.where(inside, (1 + beta) * s - beta * w, -np.inf)
            figures["right"].append(z.argmax() == token)
            figures["base_right"].append(s.argmax() == token)
            figures["candidates"].append(inside[token])
            if inside[token]:
                figures["loss"].append(-np.log(softmax(z)[token]))
                figures["base_loss"].append(-np.log(softmax(np.where(inside, s, -np.inf))[token]))
    mean = {name: float(np.mean(values)) for name, values in figures.items()}
    mine = found["betas"][1]
    assert mine["beta"] == beta and found["kl"]["value"] == pytest.approx(mean["kl"], rel=1e-4)
    assert found["agreement"]["value"] == mean["agreement"] and found["candidates"]["value"] == mean["candidates"]
    assert mine["accuracy"]["value"] == mean["right"] and found["base_accuracy"]["value"] == mean["base_right"]
    assert mine["loss"]["value"] == pytest.approx(mean["loss"], rel=1e-4)
    assert mine["change"]["value"] == pytest.approx(mean["loss"] - mean["base_loss"], abs=1e-4)
    assert sum(part["tokens"] for part in found["per_domain"].values()) == found["tokens"]
    same = contrast(with_k(model, 1), batches(), rank=1, betas=[1.0], alpha=0.5)
    assert abs(same["kl"]["value"]) < 1e-6 and same["betas"][0]["difference"]["value"] == 0.0


def test_contrast_refuses_what_is_none() -> None:
    for options in (Contrast(ranks=(9,)), Contrast(ranks=(0,)), Contrast(betas=(0.0,)), Contrast(alpha=0.0)):
        with pytest.raises(InputError, match="--contrast"):
            options.require_sense(8)


def _by_hand(model: Any, batch: TokenBatch, row: int, options: Rerouting, end: int) -> tuple[list[float], list[Tensor]]:
    """Losses (length - 1) of a sequence with vectors fitted on its first ``end`` tokens, and the vectors."""
    ids = torch.from_numpy(batch.input_ids[row])
    vectors = [torch.zeros(8, requires_grad=True) for _ in range(2)]
    descent = torch.optim.Adam(vectors, lr=options.rate, eps=1e-6)

    def losses(part: Tensor) -> Tensor:
        with choosing(model, lambda layer, logits: best(logits + vectors[layer], 2)):
            logits = model(input_ids=part[None], use_cache=False).logits[0, :-1]
        return nn.functional.cross_entropy(logits, part[1:], reduction="none")

    for _ in range(options.steps):
        descent.zero_grad()
        losses(ids[:end]).mean().backward()
        descent.step()
    with torch.no_grad():
        return losses(ids).tolist(), [one.detach() for one in vectors]


def test_rerouting_is_fitted_on_the_beginning_and_judged_by_the_rest(model: Any) -> None:
    text = batches(rows=2, domains=("a",))[:1]
    text = [TokenBatch(**{**vars(text[0]), "attention_mask": np.ones_like(text[0].input_ids)})]
    options = Rerouting(steps=3, rate=0.02, prompt=0.5, interval=100, sequences=4)
    read: list[int] = []
    before = {name: one.clone() for name, one in model.state_dict().items()}
    found = rerouting(model, find_moe_layers(model), text, options, progress=read.append)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.requires_grad for one in model.parameters()) and sum(read) == work(text, options)
    end = 9
    by_hand = [_by_hand(model, text[0], row, options, end) for row in range(2)]
    tail = np.mean([loss for losses, _ in by_hand for loss in losses[end - 1 :]])
    assert found["tokens"] == 2 * (18 - end) and found["sequences"] == found["fits"] == 2
    assert found["conditions"]["fitted"]["loss"]["value"] == pytest.approx(tail, abs=2e-3)
    assert found["norm"] == pytest.approx(float(np.mean([one.norm() for _, two in by_hand for one in two])), rel=0.02)
    plain = [np.nansum(_losses(model, text[0], row)[end - 1 :]) for row in range(2)]
    assert found["conditions"]["none"]["loss"]["value"] == pytest.approx(sum(plain) / found["tokens"], rel=1e-5)
    assert found["fit"]["after"]["value"] < found["fit"]["before"]["value"]
    both = found["conditions"]["fitted"]["loss"]["value"] - found["conditions"]["other"]["loss"]["value"]
    assert found["against_other"]["value"] == pytest.approx(both)


def _losses(model: Any, batch: TokenBatch, row: int) -> np.ndarray:
    logs = logits_of(model, batch).log_softmax(-1)[row, :-1]
    found: np.ndarray = -logs.gather(-1, torch.from_numpy(batch.input_ids)[row, 1:, None])[:, 0].numpy()
    return found


def test_rerouting_fits_again_at_intervals_and_refuses(model: Any) -> None:
    text = batches(rows=2)
    options = Rerouting(layers=(1,), steps=1, interval=3, sequences=3)
    found = rerouting(model, options.require_sense(find_moe_layers(model)), text, options)
    assert found["sequences"] == 3 and set(found["per_domain"]) == {"a", "b"}
    assert found["fits"] == 3 + 3 + 3 or found["fits"] > found["sequences"]
    with pytest.raises(ModelError, match="no MoE layer 5"):
        Rerouting(layers=(5,)).require_sense(find_moe_layers(model))
    with pytest.raises(InputError, match="part of each sequence"):
        Rerouting(prompt=1.0).require_sense([])
    with pytest.raises(CorpusError, match="two sequences"):
        rerouting(model, find_moe_layers(model), text, Rerouting(sequences=1))


def test_search_solves_what_greedy_generation_writes(model: Any) -> None:
    counts = (1, 2, 4)
    prompts = items_of_text(batches(rows=4, length=24), prompt_tokens=6, answer_tokens=2)
    written = {k: generate(with_k(model, k), np.stack([one.prompt for one in prompts]), 2) for k in counts}
    # Answers that some branch writes, so that there is something to solve.
    wanted = [written[counts[place % 3]][place] for place in range(len(prompts))]
    items = [Item(one.domain, one.prompt, np.array(answer)) for one, answer in zip(prompts, wanted, strict=True)]
    found = search(model, items, Search(counts, temperature=0.5), top_k=2)
    solved = {k: [text[: len(want)] == want for text, want in zip(written[k], wanted, strict=True)] for k in counts}
    assert {one["k"]: one["solved"]["value"] for one in found["counts"]} == {
        k: pytest.approx(np.mean(values)) for k, values in solved.items()
    }
    assert found["union"]["value"] == 1.0 and found["samples"] == 7 // 2
    chance = []
    for item in items:
        ids = torch.from_numpy(np.concatenate([item.prompt, item.answer]))[None]
        with torch.no_grad():
            logs = (model(input_ids=ids).logits[0].double() / 0.5).log_softmax(-1)
        steps = range(len(item.prompt) - 1, ids.shape[1] - 1)
        chance.append(float(np.exp(sum(float(logs[place, ids[0, place + 1]]) for place in steps))))
    assert found["sampled"]["value"] == pytest.approx(np.mean([1 - (1 - p) ** 3 for p in chance]), rel=1e-4)
    pair = next(one for one in found["jaccard"] if (one["first"], one["second"]) == (4, 1))
    either = sum(a or b for a, b in zip(solved[4], solved[1], strict=True))
    assert pair["value"] == sum(a and b for a, b in zip(solved[4], solved[1], strict=True)) / either


def test_items_are_read_and_refused_by_line(tmp_path: Any) -> None:
    words = tokenizer()
    file = tmp_path / "items.jsonl"
    file.write_text('{"prompt": "ab", "answer": "c"}\n\n{"prompt": "a", "answer": "bc", "domain": "d"}\n')
    items = read_items(file, words)
    assert [(one.domain, len(one.answer)) for one in items] == [("items", 1), ("d", 2)]
    for line, reason in (("{", "no JSON"), ('["a"]', "has a prompt"), ('{"prompt": "a"}', "has a prompt")):
        file.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
        with pytest.raises(InputError, match=f"line 2: .*{reason}"):
            read_items(file, words)
    file.write_text('{"prompt": "aaaaaa", "answer": "b"}')
    with pytest.raises(InputError, match="7 tokens, more than the model's 4"):
        read_items(file, words, most_tokens=4)
    file.write_text("\n")
    for path in (file, tmp_path / "none.jsonl"):
        with pytest.raises(InputError, match="--items"):
            read_items(path, words)
    with pytest.raises(CorpusError, match="long enough|has the"):
        items_of_text(batches(), prompt_tokens=40)


def test_gradients_of_a_vector_pass_later_routers_once(model: Any) -> None:
    ids = torch.from_numpy(batches()[0].input_ids[:1])

    def gradients(put: Any) -> list[Tensor]:
        vectors = [torch.zeros(8, requires_grad=True) for _ in range(2)]
        with put(vectors):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        return list(torch.autograd.grad(nn.functional.cross_entropy(logits, ids[0, 1:]), vectors))

    found = gradients(lambda two: rerouted(model, {(layer, 0): Bias(one) for layer, one in enumerate(two)}))
    wanted = gradients(lambda two: choosing(model, lambda layer, logits: best(logits + two[layer], 2)))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max()))
