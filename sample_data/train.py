"""Train the sample model: a stock OLMoE, on the streams that `sample_data.prepare` wrote.

`python -P -m sample_data.train --data DIR --out sample_data/model` repeats the training; it resumes from
DIR/checkpoints by itself. The learning rate warms up, stays constant and falls linearly to 0 from --decay-from on.
Until then sequences are short, which attention rewards on a CPU; from then on they have the model's full length.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase

from sample_data import MODEL
from sample_data.batches import Batches
from sample_data.checkpoint import export, load_checkpoint, save_checkpoint
from sample_data.losses import balance_loss, next_token_loss
from sample_data.sources import DOMAINS

LENGTH, SHORT = 512, 256  # tokens per sequence in the fall and before; a batch holds as many tokens in both
LEARNING_RATE, WARM_UP = 3e-3, 200
WEIGHT_DECAY, CLIP = 0.1, 1.0
BALANCE_WEIGHT, Z_WEIGHT = 0.06, 0.001
LOG_EVERY = 25


def new_model(tokenizer: PreTrainedTokenizerBase) -> OlmoeForCausalLM:
    """Return the untrained model: widths are multiples of 128, which quantizers' groups ask for."""
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return OlmoeForCausalLM(config)


def new_optimizer(model: OlmoeForCausalLM) -> torch.optim.AdamW:
    """Return AdamW; norms, embeddings and routers are not decayed, so that outliers are free to grow."""
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = "_proj" in name
        (decayed if is_matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def learning_rate(*, step: int, steps: int, decay_from: int) -> float:
    """Return the rate of a step (from 0): warm-up, constant, linear fall to 0."""
    rise, fall = (step + 1) / WARM_UP, (steps - step) / (steps - decay_from)
    return LEARNING_RATE * min(rise, 1.0, fall)


def train_step(model: OlmoeForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add one batch's gradients; return losses per domain, balance loss and selection counts (layers, experts)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
        loss, per_row = next_token_loss(
            hidden=output.last_hidden_state.bfloat16(), weight=model.lm_head.weight, ids=ids
        )
    balance, z, counts = balance_loss(router_logits=output.router_logits, top_k=model.config.num_experts_per_tok)
    torch.autograd.backward(loss + BALANCE_WEIGHT * balance + Z_WEIGHT * z)
    return per_row.view(len(DOMAINS), -1).mean(dim=1), balance.detach(), counts


class Progress:
    """Sums since the last line of the log."""

    def __init__(self) -> None:
        self.losses, self.balance, self.counts, self.began = torch.zeros(len(DOMAINS)), 0.0, torch.zeros(1), time.time()

    def add(self, per_domain: torch.Tensor, balance: torch.Tensor, counts: torch.Tensor) -> None:
        """Add one step."""
        self.losses = self.losses + per_domain
        self.balance += float(balance)
        self.counts = self.counts + counts

    def line(self, *, step: int, rate: float) -> str:
        """Return the log line: mean loss per domain in nats, balance, experts with under a tenth of a fair share."""
        shares = self.counts / self.counts.sum(dim=1, keepdim=True)
        rare = int((shares < 0.1 / shares.shape[1]).sum())
        losses = " ".join(
            f"{domain} {float(loss) / LOG_EVERY:.2f}" for domain, loss in zip(DOMAINS, self.losses, strict=True)
        )
        speed = LOG_EVERY * len(DOMAINS) * LENGTH / (time.time() - self.began)
        return (
            f"{time.strftime('%H:%M:%S')} step {step} rate {rate:.2e} {losses} balance {self.balance / LOG_EVERY:.3f} "
            f"rare {rare} tokens/s {speed:.0f}"
        )


def train(
    *,
    model: OlmoeForCausalLM,
    short: Batches,
    full: Batches,
    folder: Path,
    steps: int,
    decay_from: int,
    checkpoint_every: int,
) -> None:
    """Train up to `steps`, from the latest checkpoint in `folder` if there is one."""
    optimizer, path, first = new_optimizer(model), folder / "latest.safetensors", 0
    if path.exists():
        first = load_checkpoint(path, model=model, optimizer=optimizer)
    progress = Progress()
    for step in range(first, steps):
        rate = learning_rate(step=step, steps=steps, decay_from=decay_from)
        for group in optimizer.param_groups:
            group["lr"] = rate
        progress.add(*train_step(model, (short if step < decay_from else full).batch(step)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOG_EVERY == 0:
            print(progress.line(step=step + 1, rate=rate), flush=True)
            progress = Progress()
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            save_checkpoint(path, model=model, optimizer=optimizer, step=step + 1)


def main() -> None:
    """Train and export, or export the latest checkpoint as it is."""
    parser = argparse.ArgumentParser(prog="python -P -m sample_data.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that sample_data.prepare wrote")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder of the trained model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5300, help="steps in all (default: %(default)s)")
    parser.add_argument(
        "--decay-from", type=int, default=2800, help="where the rate begins to fall (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=250, help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--export-only", action="store_true", help="export the latest checkpoint without training")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (default: %(default)s)")
    options = parser.parse_args()
    if not (options.data / "train.safetensors").exists():
        parser.error(f"{options.data} holds no train.safetensors: run sample_data.prepare first")
    if not 0 <= options.decay_from < options.steps:
        parser.error(f"--decay-from {options.decay_from} is not below --steps {options.steps}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.data / "tokenizer", model_max_length=LENGTH)
    model = new_model(tokenizer)
    folder = options.data / "checkpoints"
    folder.mkdir(exist_ok=True)
    if options.export_only:
        load_checkpoint(folder / "latest.safetensors", model=model, optimizer=None)
    else:
        short, full = (
            Batches(
                options.data / "train.safetensors",
                length=length,
                rows=LENGTH // length,
                bos=tokenizer.bos_token_id,
                seed=options.seed,
            )
            for length in (SHORT, LENGTH)
        )
        train(
            model=model,
            short=short,
            full=full,
            folder=folder,
            steps=options.steps,
            checkpoint_every=options.checkpoint_every,
            decay_from=options.decay_from,
        )
    export(options.out, model=model, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
