"""Measure the sample model on its held-out texts and print the Markdown tables of README.md.

`python -P -m sample_data.evaluate --data DIR` needs the token streams that `sample_data.prepare` wrote to DIR, for the
n-gram baselines; without --data their columns stay empty.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, OlmoeForCausalLM, PreTrainedTokenizerBase

from sample_data import MODEL, TEXTS
from sample_data.ngrams import Bigram, Unigram
from sample_data.observation import Observation, observe
from sample_data.sources import DOMAINS

NEARLY_DEAD = 0.1  # of a fair share of the selections


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows]) + "\n"


def held_out_sequences(
    *, tokenizer: PreTrainedTokenizerBase, folder: Path, length: int, limit: int | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (domain, ids): every document with EOS, cut to pieces of `length` with BOS before each."""
    for domain, name in enumerate(DOMAINS):
        used = 0
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for start in range(0, len(ids), length - 1):
                piece = ids[start : start + length - 1]
                if limit is None or used < limit:
                    used += len(piece)
                    yield domain, torch.tensor([tokenizer.bos_token_id, *piece])


def perplexity_table(
    *, observation: Observation, sequences: list[tuple[int, torch.Tensor]], data: Path | None, vocabulary: int
) -> str:
    """Return perplexities per domain beside the n-grams', which are trained on that domain's training tokens alone."""
    streams = load_file(data / "train.safetensors") if data else {}
    rows = []
    for domain, name in enumerate(DOMAINS):
        pieces = [ids.numpy() for owner, ids in sequences if owner == domain]
        previous = numpy.concatenate([piece[:-1] for piece in pieces])
        following = numpy.concatenate([piece[1:] for piece in pieces])
        own = torch.cat(observation.losses[domain])
        others = ["", ""]
        if data:
            models = [kind(stream=streams[name], vocabulary=vocabulary) for kind in (Unigram, Bigram)]
            others = [
                f"{numpy.exp(model.losses(previous=previous, following=following).mean()):.1f}" for model in models
            ]
        training = str(streams[name].size) if data else ""
        rows.append([name, training, str(len(own)), *others, f"{float(own.mean().exp()):.2f}"])
    return table(["domain", "training tokens", "held-out tokens", "unigram", "bigram", "model"], rows)


def specialization_table(observation: Observation) -> str:
    """Return per layer how the experts' shares vary over domains, and how many experts are hardly used."""
    shares = observation.counts / observation.counts.sum(dim=2, keepdim=True)  # each domain's shares sum to 1
    mean = shares.mean(dim=0)
    variation = shares.std(dim=0, correction=0) / mean
    rows = []
    for layer, (share, row) in enumerate(zip(mean, variation, strict=True)):
        fair = 1 / len(share)
        dead = int((observation.counts[:, layer].sum(dim=0) == 0).sum())
        used = row[share > 0]
        rows.append(
            [
                str(layer),
                f"{float(used.mean()):.2f}",
                f"{float(used.max()):.2f}",
                f"{float(share.std(correction=0) / fair):.2f}",
                f"{float(share.max() / fair):.2f}",
                str(dead),
                str(int((share < NEARLY_DEAD * fair).sum()) - dead),
            ]
        )
    return table(
        [
            "layer",
            "variation over domains, mean",
            "largest",
            "variation of load",
            "largest load / fair",
            "dead",
            "nearly dead",
        ],
        rows,
    )


def outlier_table(observation: Observation) -> str:
    """Return per layer the attention mass on position 0 and the largest activation against the median."""
    rows = []
    for layer, (position, channel) in enumerate(observation.hidden_place):
        largest, median = float(observation.hidden_maximum[layer]), float(observation.hidden_median[layer])
        rows.append(
            [
                str(layer),
                f"{100 * float(observation.sink[layer]):.1f} %",
                f"{largest:.1f}",
                f"{median:.3f}",
                f"{largest / median:.0f}",
                str(position),
                str(channel),
            ]
        )
    return table(
        ["layer", "attention on position 0", "max abs h", "median abs h", "ratio", "position", "channel"], rows
    )


def super_expert_table(observation: Observation) -> str:
    """Return the five largest experts by |down_proj output| and whether they pass the rule of Su et al. (2025).

    Super experts exceed both the 99.5th percentile of all experts and a tenth of the largest value, in the first three
    quarters of the layers.
    """
    values = observation.output_maximum.double()
    percentile, tenth = float(numpy.percentile(values.numpy(), 99.5)), float(values.max()) / 10
    early = int(0.75 * len(values))
    rows = []
    for place in values.flatten().argsort(descending=True)[:5].tolist():
        layer, expert = divmod(place, values.shape[1])
        value = float(values[layer, expert])
        passes = value > max(percentile, tenth) and layer < early
        rows.append([f"({layer}, {expert})", f"{value:.2f}", "yes" if passes else "no"])
    median = float(values.median())
    note = f"\n99.5th percentile {percentile:.2f}; a tenth of the largest {tenth:.2f}; median {median:.2f}\n"
    return table(["(layer, expert)", "max abs down_proj output", "passes the rule"], rows) + note


def silence(model: OlmoeForCausalLM, *, layer: int, expert: int) -> None:
    """Set an expert's down_proj to 0: the router goes on selecting it, its output is nothing."""
    with torch.no_grad():
        model.get_submodule(f"model.layers.{layer}.mlp.experts").get_parameter("down_proj")[expert] = 0


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(
        prog="python -P -m sample_data.evaluate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder (default: %(default)s)")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="held-out texts (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder that sample_data.prepare wrote, for the n-grams")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="tokens per domain, for a quick look")
    parser.add_argument("--zero", type=int, nargs=2, metavar=("LAYER", "EXPERT"), help="silence one expert first")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        parser.error(f"{options.model} is no model folder: run sample_data.train first")
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = OlmoeForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="eager")
    if options.zero:
        silence(model, layer=options.zero[0], expert=options.zero[1])
    sequences = list(
        held_out_sequences(tokenizer=tokenizer, folder=options.texts, length=options.length, limit=options.limit)
    )
    observation = observe(model=model, sequences=sequences, domains=len(DOMAINS))
    print(
        "### Perplexity\n\n"
        + perplexity_table(observation=observation, sequences=sequences, data=options.data, vocabulary=len(tokenizer))
    )
    print("### Specialisation\n\n" + specialization_table(observation))
    print(
        f"### Outliers\n\neven attention would put {100 * observation.even_mass:.1f} % on position 0\n\n"
        + outlier_table(observation)
    )
    print("### Super experts\n\n" + super_expert_table(observation))


if __name__ == "__main__":
    main()
