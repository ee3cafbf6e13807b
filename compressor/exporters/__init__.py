"""Plans in the words of engines: one file per format, and this list of them. Nothing here imports torch.

::

    exported = exporter("autoround").export(plan)
    exported.text, exported.left_out

To add a format, write a file with ``export(plan) -> Exported`` and list it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from compressor.exporters import (
    autoround,
    eplb,
    gguf,
    gptqmodel,
    hot_experts,
    ktransformers,
    llama_cpp,
    llama_cpp_cache,
    llm_compressor,
    moe_infinity,
    sglang,
    sglang_counts,
    sglang_kt,
    tensorrt_llm,
    torchao,
    vllm,
    vllm_ascend,
)
from compressor.exporters.exported import Exported
from compressor.plan import Plan
from moescope.errors import InputError, PlanError

__all__ = ["EXPORTERS", "Exported", "Exporter", "exporter"]


@dataclass(frozen=True)
class Exporter:
    """One format.

    Attributes:
        name: on the command line.
        title: what is written, for whom.
        suffix: of the file.
        write: plan -> content and what is left out; called by :meth:`export`.
        step: the step of a plan that it speaks of: quantize, cache or place.
    """

    name: str
    title: str
    suffix: str
    write: Callable[[Plan], Exported]
    step: Literal["quantize", "cache", "place"] = "quantize"

    def export(self, plan: Plan) -> Exported:
        """The plan in the words of the engine.

        Raises:
            PlanError: nothing of it can be said there, or it changes the choice of the routers, which no engine does.
        """
        if plan.route is not None:
            raise PlanError(
                f"the plan has a route step, and {self.title.partition(':')[0]} cannot change what a router chooses:"
                " compressor.load does; leave the step out to export the rest"
            )
        return self.write(plan)


EXPORTERS: tuple[Exporter, ...] = (
    Exporter("autoround", "AutoRound: layer_config, every width of every projection", ".json", autoround.export),
    Exporter("llm-compressor", "llm-compressor: recipe with one group per width", ".yaml", llm_compressor.export),
    Exporter("gptqmodel", "GPTQModel 7.3 or later: dynamic", ".json", gptqmodel.export),
    Exporter("gguf", "llama.cpp: types by layer and projection, for --tensor-type-file", ".txt", gguf.export),
    Exporter("torchao", "torchao: FqnToConfig, layers of 8 bits alone", ".json", torchao.export),
    Exporter("llama.cpp", "llama.cpp: arguments, whole layers", ".txt", llama_cpp.export, "cache"),
    Exporter("llama.cpp-cache", "a fork of llama.cpp: --moe-cache-profile", ".csv", llama_cpp_cache.export, "cache"),
    Exporter("hot-experts", "tools around llama.cpp: layer,expert,count", ".csv", hot_experts.export, "cache"),
    Exporter("sglang-kt", "KTransformers in SGLang: --init-expert-location", ".pt", sglang_kt.export, "cache"),
    Exporter("ktransformers", "KTransformers as it was: rules, whole layers", ".yaml", ktransformers.export, "cache"),
    Exporter("moe-infinity", "MoE-Infinity: configuration, shares of memory", ".json", moe_infinity.export, "cache"),
    Exporter("sglang", "SGLang: --init-expert-location, experts per slot", ".json", sglang.export, "place"),
    Exporter("sglang-counts", "SGLang: --init-expert-location, counts", ".json", sglang_counts.export, "place"),
    Exporter("tensorrt-llm", "TensorRT-LLM: moe_load_balancer, slots", ".yaml", tensorrt_llm.export, "place"),
    Exporter("vllm", "vLLM: arguments; it takes no map", ".txt", vllm.export, "place"),
    Exporter("vllm-ascend", "vLLM on Ascend, model runner V1: map", ".json", vllm_ascend.export, "place"),
    Exporter("eplb", "EPLB: arrays phy2log, log2phy, logcnt", ".npz", eplb.export, "place"),
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
