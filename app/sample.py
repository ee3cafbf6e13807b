"""What has to be said wherever figures of the bundled model stand."""

from __future__ import annotations

from store import Run

REMARK = (
    "The bundled model is small and its domains differ by script, which flatters pruning and caching: a large model on"
    " mixed text shows less."
)


def remarks(run: Run) -> list[str]:
    """The remark, for a run of the bundled model; nothing for others."""
    return [REMARK] if run.info.model.replace("\\", "/").endswith("sample_data/model") else []
