"""What runs in other processes: AutoRound on one checkpoint, and then its result loaded again and looked at.

Started as a file, ``python job.py quantize|look FOLDER``, with ``FOLDER/job.json``. The Python that runs it needs
auto_round, transformers and torch; errors of weights are computed where it has pydantic, too.

AutoRound changes its process for good: it swaps classes (DeepSeek-V3), and once it has quantized or loaded a model,
transformers loads others of the family with random experts (0.16.1 with transformers 5.23). So each part has a process
of its own, in which the source is loaded first. Parts of AutoRound start further ones, which import this file again.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

STAYS = {"bits": 16, "data_type": "fp"}


def main(part: str, folder: Path) -> None:
    """Do one part of the job in ``folder``: ``quantize`` makes ``result``, ``look`` makes ``seen.json``."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    import torch

    torch.manual_seed(job["seed"])
    if part == "quantize":
        _quantize(job, folder).rename(folder / "result")
    else:
        (folder / "seen.json").write_text(json.dumps(_look(job, folder / "result")), encoding="utf-8")


def _quantize(job: dict[str, Any], folder: Path) -> Path:
    """The folder that AutoRound writes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rounder: Any = importlib.import_module("auto_round").AutoRound  # not installed where this file is only read
    model: Any = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto", local_files_only=True)
    layers = dict(job["layer_config"])
    for name, module in model.named_modules():
        # What is not an expert stays; the head is never AutoRound's unless it is asked to.
        if isinstance(module, torch.nn.Linear) and name not in layers and module is not model.get_output_embeddings():
            layers[name] = dict(STAYS)
    tokenizer = AutoTokenizer.from_pretrained(job["source"], local_files_only=True)  # it refuses to work without one
    rows = torch.tensor(job["rows"], dtype=torch.int64)
    options: dict[str, Any] = {"iters": job["iters"], "disable_model_free": True, "enable_torch_compile": False}
    if not job["iters"]:
        options["disable_opt_rtn"] = True
    rounding = rounder(
        model, tokenizer, scheme=job["scheme"], layer_config=layers, dataset=list(rows.split(job["batch"])),
        seqlen=rows.shape[1], nsamples=len(rows), batch_size=job["batch"], device_map=job["device"], seed=job["seed"],
        **options,
    )  # fmt: skip
    rounding.quantize_and_save(str(folder / "saved"), format="auto_round")
    return next(path.parent for path in sorted((folder / "saved").rglob("config.json")))


def _look(job: dict[str, Any], result: Path) -> dict[str, Any]:
    """What the result is when it is loaded: keys, the error of every matrix, and logits of one row."""
    import torch
    from transformers import AutoModelForCausalLM

    source = _source_weights(job)
    settings = {"local_files_only": True, "device_map": job["device"]}
    loader: Any = AutoModelForCausalLM.from_pretrained
    model, info = loader(result, output_loading_info=True, **settings)
    seen = {name: [str(key) for key in info.get(name) or ()] for name in ("missing_keys", "mismatched_keys")}
    modules = dict(model.named_modules())
    errors = {}
    with torch.no_grad():
        for name, entry in job["layer_config"].items():
            if entry["bits"] < 16 and name in source:
                errors[name] = _error(modules.get(name), source[name], job["device"])
        row = torch.tensor(job["rows"][:1], device=job["device"])[:, : job["look"]]
        logits = model(row).logits[0].float().cpu()
    torch.save({"ids": row[0].cpu(), "logits": logits}, result.parent / "logits.pt")
    return {**seen, "errors": errors}


def _source_weights(job: dict[str, Any]) -> dict[str, Any]:
    """Module name -> its matrix in the source."""
    from transformers import AutoModelForCausalLM

    sys.path.append(job["root"])  # at the end: this Python's own packages come first
    try:
        from compressor.autoround.names import weights_by_name
    except ImportError as error:
        print(f"errors of weights are not computed: {error}", flush=True)
        return {}
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto", local_files_only=True)
    return weights_by_name(model, job["plan"])


def _error(module: Any, weight: Any, device: str) -> float | None:
    """Relative error of a matrix, whatever a module keeps of it: what the module makes of the unit vectors."""
    import torch

    if module is None:
        return None
    kept = getattr(module, "weight", None)
    dtype = torch.float32 if kept is None else kept.dtype
    units = torch.eye(weight.shape[1], dtype=dtype, device=device)
    bias = getattr(module, "bias", None)
    found = module(units).float() - (0 if bias is None else bias.float())
    wanted = weight.float().to(device)
    return float((found.T - wanted).detach().norm() / wanted.norm().clamp(min=1e-30))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
