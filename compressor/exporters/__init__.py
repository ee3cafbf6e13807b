"""Plans in the words of engines: one file per format, and this list of them. Nothing here imports torch.

::

    exported = exporter("autoround").export(plan)
    exported.text, exported.left_out

To add a format, write a file with ``export(plan) -> Exported`` and list it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compressor.exporters import autoround, gguf, gptqmodel, llm_compressor, torchao
from compressor.exporters.exported import Exported
from compressor.plan import Plan
from moescope.errors import InputError

__all__ = ["EXPORTERS", "Exported", "Exporter", "exporter"]


@dataclass(frozen=True)
class Exporter:
    """One format.

    Attributes:
        name: on the command line.
        title: what is written, for whom.
        suffix: of the file.
        export: plan -> text and what is left out.
    """

    name: str
    title: str
    suffix: str
    export: Callable[[Plan], Exported]


EXPORTERS: tuple[Exporter, ...] = (
    Exporter("autoround", "AutoRound: layer_config, every width of every projection", ".json", autoround.export),
    Exporter("llm-compressor", "llm-compressor: recipe with one group per width", ".yaml", llm_compressor.export),
    Exporter("gptqmodel", "GPTQModel 7.3 or later: dynamic", ".json", gptqmodel.export),
    Exporter("gguf", "llama.cpp: types by layer and projection, for --tensor-type-file", ".txt", gguf.export),
    Exporter("torchao", "torchao: FqnToConfig, layers of 8 bits alone", ".json", torchao.export),
)


def exporter(name: str) -> Exporter:
    """The format of a name.

    Raises:
        InputError: there is none; the message lists all.
    """
    for one in EXPORTERS:
        if one.name == name:
            return one
    raise InputError(f"no engine {name!r} to export to; there are {', '.join(one.name for one in EXPORTERS)}")
