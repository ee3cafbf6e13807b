"""What a model has beside its routed experts, decoder layer by decoder layer, as far as its configuration says.

Sizes are estimates: a configuration names no tensors. What it does not say is assumed, and each assumption is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.plan import Source
from moescope.errors import PlanError

_WINDOWED = ("sliding_attention", "chunked_attention")
_STATES = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "kda", "linear")
_NO_MIXER = ("moe", "mlp")
_FULL = ("full_attention", "attention", "indexed_attention", "full", "global")
_PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OUTPUT_GATES = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")


@dataclass(frozen=True)
class DenseLayer:
    """A decoder layer without its routed experts.

    Attributes:
        kind: ``full`` attention; ``window``: of the last tokens; ``state``: linear attention, a recurrence or a
            convolution, whose state does not grow; ``none``: no mixing of tokens.
        kv_values: keys and values kept per token; 0 for those whose state does not grow.
        window: tokens kept at most; 0 = all.
        parameters: weights of attention, router, shared experts, dense feed-forward and norms.
    """

    kind: str
    kv_values: int
    window: int
    parameters: int


@dataclass(frozen=True)
class DensePart:
    """All that a model has beside its routed experts.

    Attributes:
        layers: decoder layers in order.
        embedding: weights of the token embedding.
        head: weights that a pass reads to give logits.
        tied: the head is the embedding, and takes no memory of its own.
        vocabulary: tokens.
        attention_width: values of the queries of one token, in the layer that has most.
        assumed: what the configuration does not say.
    """

    layers: tuple[DenseLayer, ...]
    embedding: int
    head: int
    tied: bool
    vocabulary: int
    attention_width: int
    assumed: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Of all."""
        own_head = 0 if self.tied else self.head
        return self.embedding + own_head + sum(layer.parameters for layer in self.layers)


def dense_part(config: Mapping[str, Any], source: Source) -> DensePart:
    """What a model has beside its routed experts.

    Args:
        config: of the model, as ``config.json`` has it; the text model's part may lie inside.
        source: its experts.

    Raises:
        PlanError: the configuration says nothing of attention heads or of the vocabulary.
    """
    reader = _Reader(config, source)
    kinds = _kinds(reader, source.num_layers)
    shared_kv = reader.number("num_kv_shared_layers")
    layers = []
    for number, kind in enumerate(kinds):
        layer = _layer(reader, source, number, kind)
        if shared_kv and number >= source.num_layers - shared_kv:
            layer = DenseLayer(layer.kind, 0, layer.window, layer.parameters)
        layers.append(layer)
    vocabulary = reader.number("vocab_size", "n_vocab", "padded_vocab_size")
    if not vocabulary:
        raise PlanError(f"the configuration of {source.model} has no vocab_size: say what the other weights take")
    table = vocabulary * source.hidden_size
    return DensePart(
        layers=tuple(layers), embedding=table, head=table, tied=bool(reader.value("tie_word_embeddings")),
        vocabulary=vocabulary, attention_width=max(reader.query_width(kind) for kind in kinds),
        assumed=tuple(dict.fromkeys(reader.assumed)),
    )  # fmt: skip


class _Reader:
    """A configuration, the text model's part first."""

    def __init__(self, config: Mapping[str, Any], source: Source) -> None:
        self.configs = list(_parts(config))
        self.source = source
        self.assumed: list[str] = []
        if self.value("is_encoder_decoder"):
            self.assumed.append("cross-attention and the encoder are left out")
        self.heads = self.number("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
        if not self.heads:
            raise PlanError(
                f"the configuration of {source.model} has no num_attention_heads, so keys and values are not known: say"
                " what they and the other weights take"
            )

    def value(self, *names: str) -> Any:
        for config in self.configs:
            for name in names:
                if config.get(name) is not None:
                    return config[name]
        return None

    def number(self, *names: str) -> int:
        """A whole number above 0, else 0."""
        found = self.value(*names)
        return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0

    def head(self, kind: str) -> tuple[int, int, int]:
        """(key and value heads, width of a key, width of a value) of plain attention."""
        width = self.number("head_dim", "kv_channels", "d_kv") or self.source.hidden_size // self.heads
        heads = self.number("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_query_groups") or self.heads
        if kind not in _WINDOWED:
            width = self.number("global_head_dim") or width
            heads = self.number("num_global_key_value_heads") or heads
        return heads, width, self.number("v_head_dim") or width

    def query_width(self, kind: str) -> int:
        if kind in _NO_MIXER or kind in _STATES:
            return self.source.hidden_size
        if self.number("kv_lora_rank"):
            return self.heads * (self.number("qk_nope_head_dim") + self.number("qk_rope_head_dim"))
        return self.heads * self.head(kind)[1]


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and (name.endswith("text_config") or name in ("thinker_config", "llm_config")):
            yield from _parts(value)
    yield config


def _kinds(reader: _Reader, count: int) -> list[str]:
    """How each decoder layer mixes tokens, in the words of ``layer_types``."""
    listed = reader.value("layer_types", "layers_block_type")
    pattern = reader.value("hybrid_override_pattern")
    if isinstance(pattern, str) and not listed:
        listed = [_PATTERN.get(letter, "full_attention") for letter in pattern]
    if isinstance(listed, (list, tuple)) and len(listed) >= count:
        return [_known(reader, str(kind)) for kind in listed[:count]]
    linear = reader.value("linear_attn_config")
    if isinstance(linear, Mapping) and isinstance(linear.get("full_attn_layers"), list):
        full = {one - 1 for one in linear["full_attn_layers"]}  # counted from 1
        return ["full_attention" if one in full else "linear_attention" for one in range(count)]
    if interval := reader.number("full_attention_interval"):
        return ["linear_attention" if (one + 1) % interval else "full_attention" for one in range(count)]
    if period := reader.number("attn_layer_period"):
        offset = reader.number("attn_layer_offset")
        return ["full_attention" if one % period == offset else "mamba" for one in range(count)]
    window = reader.number("sliding_window") if reader.value("use_sliding_window") is not False else 0
    if window:
        if every := reader.number("sliding_window_pattern"):
            return ["sliding_attention" if (one + 1) % every else "full_attention" for one in range(count)]
        first = reader.number("max_window_layers")
        return ["full_attention" if one < first else "sliding_attention" for one in range(count)]
    return ["full_attention"] * count


def _known(reader: _Reader, kind: str) -> str:
    if kind in _WINDOWED or kind in _STATES or kind in _NO_MIXER or kind in _FULL:
        return kind
    reader.assumed.append(f"layers of type {kind!r} are taken to keep keys and values as full attention does")
    return "full_attention"


def _layer(reader: _Reader, source: Source, number: int, kind: str) -> DenseLayer:
    hidden = source.hidden_size
    shape = next((one for one in source.layers if one.layer == number), None)
    parameters = 2 * hidden + _mixer(reader, hidden, kind)  # two norms
    factor = 3 if source.gated else 2
    if shape is not None:
        parameters += shape.num_experts * hidden + factor * shape.shared_width * hidden
    elif kind == "mlp" or kind not in _NO_MIXER and _is_usual(reader):
        inner = reader.number(
            "intermediate_size_mlp", "dense_intermediate_size", "intermediate_size", "ffn_hidden_size"
        )
        if not inner:
            reader.assumed.append("dense feed-forward layers are four times as wide as the residual stream")
        parameters += factor * hidden * (inner or 4 * hidden)
    if kind in _STATES or kind in _NO_MIXER:
        return DenseLayer("state" if kind in _STATES else "none", 0, 0, parameters)
    window = 0
    if kind == "sliding_attention":
        window = reader.number("sliding_window")
    elif kind == "chunked_attention":
        window = reader.number("attention_chunk_size")
    return DenseLayer("window" if window else "full", _kv_values(reader, kind), window, parameters)


def _is_usual(reader: _Reader) -> bool:
    """Each decoder layer has attention and a feed-forward part, not one of either."""
    return not (reader.value("hybrid_override_pattern") or "moe" in (reader.value("layers_block_type") or ()))


def _kv_values(reader: _Reader, kind: str) -> int:
    """Values that one token leaves behind: keys and values of its heads, or the latent vector of MLA."""
    if latent := reader.number("kv_lora_rank"):
        return latent + reader.number("qk_rope_head_dim") + reader.number("index_head_dim")
    heads, key, value = reader.head(kind)
    return heads * (key + value)


def _mixer(reader: _Reader, hidden: int, kind: str) -> int:
    """Weights of attention, or of what stands in its place."""
    heads = reader.heads
    if kind in _NO_MIXER:
        return 0
    if kind == "conv":
        return 4 * hidden * hidden
    if kind in _STATES:
        return _state_mixer(reader, hidden)
    if latent := reader.number("kv_lora_rank"):
        nope, rope = reader.number("qk_nope_head_dim"), reader.number("qk_rope_head_dim")
        value = reader.number("v_head_dim") or nope
        low = reader.number("q_lora_rank")
        query = low * (hidden + heads * (nope + rope)) if low else hidden * heads * (nope + rope)
        index = reader.number("index_n_heads") * reader.number("index_head_dim")
        if index:
            query += (low or hidden) * index + hidden * reader.number("index_head_dim")
        return query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    groups, key, value = reader.head(kind)
    gate = heads * value if reader.value("attn_output_gate") or reader.source.model_type in _OUTPUT_GATES else 0
    return hidden * (heads * key + groups * (key + value) + heads * value + gate)


def _state_mixer(reader: _Reader, hidden: int) -> int:
    keys = reader.number("linear_num_key_heads") * reader.number("linear_key_head_dim")
    heads = reader.number("linear_num_value_heads")
    values = heads * reader.number("linear_value_head_dim")
    if keys and values:  # gated delta rule: queries, keys, values, gate, two numbers per head, output
        return hidden * (2 * keys + 2 * values + 2 * heads) + values * hidden
    inner = reader.number("mamba_num_heads", "mamba_n_heads") * reader.number("mamba_head_dim", "mamba_d_head")
    inner = inner or reader.number("mamba_expand", "expand") * hidden
    if inner:  # both inputs and the output; convolution, steps and states are small beside them
        reader.assumed.append("layers with a state: their input and output projections are counted")
        return 3 * inner * hidden
    reader.assumed.append("layers with a state are taken to have four square projections")
    return 4 * hidden * hidden
