"""A small Mixture-of-Experts model trained for this project, its held-out texts, and the scripts that made both."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "model"  # an ordinary Hugging Face folder
TEXTS = FOLDER / "texts"  # <domain>.jsonl: held-out documents, never seen in training
RUN = FOLDER / "runs" / "sample.duckdb"  # the model profiled on the texts
