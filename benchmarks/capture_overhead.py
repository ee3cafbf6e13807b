"""What recording costs: forwards with and without the profiler, interleaved, as ratios measured in one run.

    python benchmarks/capture_overhead.py [--rounds 15] [--dtype float32] [--threads 1] [--levels LEVEL ...]

The model is a random OLMoE of 8 layers, width 256, 32 experts, top-4, on batches of 8 sequences of 256 tokens.
Processor time is what counts on a machine that others use too. The bare forward is the decoder without language-model
head, which is what ``collect`` runs; with a head, or with larger experts, the same recording is a smaller part.
"""

from __future__ import annotations

import argparse

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from profiler.capture.overhead import compare, time_levels

LEVELS: dict[str, float | None] = {
    "routing": 0.05,
    "routing,activations": 0.40,
    "routing,similarity": None,
    "routing,lookahead": None,
    "routing,attention": None,
    "routing,moments": None,
}
"""Levels, each with the largest overhead that we accept; gradients need a backward: capture_against_published.py."""


def main() -> None:
    """Measure and print one line per level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="forwards per variant")
    parser.add_argument("--dtype", default="float32", help="type of the weights")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), help="comma lists of levels")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = OlmoeForCausalLM._from_config(_config(), dtype=getattr(torch, arguments.dtype)).eval()
    ids = torch.randint(3, 1000, (8, 256))

    def forward() -> None:
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)

    bare, *others = time_levels(model, forward, levels=arguments.levels, rounds=arguments.rounds)
    print(
        f"{'variant':<22}{'median ms':>10}{'spread ms':>11}{'process':>10}{'95 % interval':>18}{'wall':>9}{'limit':>8}"
    )
    print(f"{'bare':<22}{_milliseconds(bare.cpu)}")
    for level, timing in zip(arguments.levels, others, strict=True):
        process = compare(bare, timing, level=level)
        wall = compare(bare, timing, level=level, clock="wall")
        limit = LEVELS.get(level)
        bound = "" if limit is None else f"{limit:.0%}"
        interval = f"{process.low:+.1%} {process.high:+.1%}"
        print(
            f"{level:<22}{_milliseconds(timing.cpu)}{process.value:>+10.1%}{interval:>18}{wall.value:>+9.1%}{bound:>8}"
        )


def _config() -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        eos_token_id=None,
    )


def _milliseconds(seconds: object) -> str:
    low, middle, high = torch.quantile(torch.as_tensor(seconds), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return f"{middle * 1e3:>10.1f}{(high - low) * 1e3:>11.1f}"


if __name__ == "__main__":
    main()
