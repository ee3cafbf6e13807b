"""Every metric, in the order in which pages and reports list them. docs/metrics.md has a section for each.

A new metric is one file beside this one, which says at its end, in ``METRICS``, what it computes, and one line below:
``*own("NAME"),`` at the place where it belongs. Metrics of older files are described here; a test holds all of them,
their functions and their sections together.
"""

from __future__ import annotations

from importlib import import_module

from profiler.metrics.metric import Metric


def own(module: str) -> tuple[Metric, ...]:
    """The metrics that ``profiler/metrics/MODULE.py`` describes itself."""
    declared: tuple[Metric, ...] = import_module(f"profiler.metrics.{module}").METRICS
    return declared


_LRC = "arXiv 2505.16056"
_SUPER = "arXiv 2507.23279"
_MIXTRAL = "arXiv 2401.04088"
_CLOSER_LOOK = "arXiv 2406.18219"
_OLMOE = "arXiv 2409.02060"
_MANTEL = "Mantel 1967"
_FATE = "arXiv 2502.12224"

METRICS: tuple[Metric, ...] = (
    # load.py
    Metric("load_share", "Load share", "share", "0..1", "the expert takes more of the layer's selections", "standard"),
    Metric("load_entropy", "Load entropy", "nats", "0..ln E", "load spreads over more experts", "standard"),
    Metric("normalised_load_entropy", "Normalised load entropy", "ratio", "0..1", "load is more even", "standard"),
    Metric("effective_experts", "Effective experts", "experts", "1..E", "load spreads over more experts", "standard"),
    Metric("gini", "Gini coefficient", "ratio", "0..(E-1)/E", "load is less even", "standard"),
    Metric(
        "cv",
        "Coefficient of variation",
        "ratio",
        "0..sqrt(E-1)",
        "load is less even",
        f"standard; {_LRC}",
        differs=True,
    ),
    Metric("max_over_mean", "Max over mean", "ratio", "1..E", "the busiest expert is busier", "standard"),
    Metric("max_violation", "MaxVio", "ratio", "0..E-1", "the busiest expert is busier", "arXiv 2408.15664"),
    Metric("min_over_mean", "Min over mean", "ratio", "0..1", "the idlest expert is less idle", "standard"),
    Metric("kl_uniform", "KL to uniform", "nats", "0..ln E", "load is less even", "standard"),
    Metric("dead_experts", "Dead experts", "experts", "0..E", "more experts are never used", "standard"),
    Metric("nearly_dead_experts", "Nearly dead experts", "experts", "0..E", "more experts are hardly used", "standard"),
    Metric("local_balance", "Local balance", "as the measure", "as the measure", "as the measure", _LRC),
    Metric(
        "load_balance_loss",
        "Load-balance loss",
        "ratio",
        "0..E",
        "load and router probability gather on the same few experts",
        "arXiv 2101.03961",
        differs=True,
    ),
    *own("imbalance"),
    # coverage.py
    Metric(
        "starved_experts",
        "Starved experts",
        "experts",
        "0..E",
        "more experts have too few tokens",
        "arXiv 2506.13329",
        differs=True,
    ),
    Metric("relative_error", "Relative error", "ratio", "0..inf", "the score is less certain", "standard"),
    Metric(
        "split_half_agreement",
        "Split-half agreement",
        "as the measure",
        "as the measure",
        "the text is enough",
        "Spearman 1910, Brown 1910",
    ),
    Metric(
        "prefix_agreement", "Prefix agreement", "as the measure", "as the measure", "less text would be enough", "ours"
    ),
    Metric("tokens_needed", "Tokens needed", "tokens", "0..inf", "more text is needed", "Spearman 1910, Brown 1910"),
    # agreement.py
    Metric(
        "score_agreement", "Agreement of scores", "correlation", "-1..1", "both scores rank experts alike", "standard"
    ),
    # confidence.py
    Metric("router_entropy", "Router entropy", "nats", "0..ln E", "the router is less decided", "standard"),
    Metric(
        "normalised_router_entropy",
        "Normalised router entropy",
        "ratio",
        "0..1",
        "the router is less decided",
        "standard",
    ),
    Metric("top_probability", "Top-1 probability", "probability", "1/E..1", "the router is more decided", "standard"),
    Metric("selected_probability", "Top-k mass", "probability", "0..1", "the selection leaves less out", "standard"),
    Metric("first_margin", "First margin", "logits", "0..inf", "the first choice is clearer", "standard"),
    Metric("boundary_margin", "Boundary margin", "logits", "0..inf", "the selection flips less easily", "standard"),
    Metric("z_loss", "Router z-loss", "squared nats", "0..inf", "the router's logits are larger", "arXiv 2202.08906"),
    Metric("weight_entropy", "Weight entropy", "nats", "0..ln k", "the selected experts weigh more alike", "standard"),
    # local_consistency.py
    Metric(
        "srp",
        "Segment routing best performance",
        "F1",
        "0..1",
        "one set of experts serves a segment better",
        _LRC,
        1,
        True,
    ),
    Metric("router_size", "Segment router size", "ratio", "0..E/k", "the best set for a segment is larger", _LRC),
    Metric("srp_expert_choice", "Expert-choice SRP", "F1", "0..1", "one set of experts serves a segment better", _LRC),
    Metric(
        "hit_rate_sch",
        "Segment cache best hit rate",
        "share",
        "0..1",
        "a cache with foresight hits more",
        _LRC,
        1,
        True,
    ),
    Metric("hit_rate_lru", "LRU hit rate", "share", "0..1", "an LRU cache hits more", _LRC, 1, True),
    Metric("hit_rate_lfu", "LFU hit rate", "share", "0..1", "an LFU cache hits more", _LRC, 1, True),
    Metric("hit_rate_belady", "Belady hit rate", "share", "0..1", "an all-knowing cache hits more", _LRC, 1, True),
    # super_experts.py
    Metric(
        "output_max",
        "Expert output maximum",
        "activation",
        "0..inf",
        "the expert puts out larger outliers",
        _SUPER,
        1,
        True,
    ),
    Metric(
        "super_experts", "Super experts", "experts", "0..L*E", "more experts drive massive activations", _SUPER, 2, True
    ),
    Metric(
        "massive_layers", "Massive-activation layers", "layers", "0..L", "more layers hold them", "arXiv 2402.17762"
    ),
    Metric("forming_layers", "Forming layers", "layers", "0..L", "they build up over more layers", _SUPER, 1, True),
    Metric(
        "output_max_kurtosis", "Output maximum kurtosis", "ratio", "-2..inf", "few experts stand out further", _SUPER
    ),
    # perplexity.py
    Metric("perplexity", "Perplexity", "ratio", "1..inf", "the text surprises the model more", "standard"),
    Metric("perplexity_ratio", "Perplexity ratio", "ratio", "0..inf", "the change did more harm", "standard"),
    Metric(
        "sink_mass", "Sink mass", "probability", "0..1", "the first position draws more attention", "arXiv 2309.17453"
    ),
    Metric("sink_decay", "Sink decay", "ratio", "-inf..1", "less is left of the attention sink", _SUPER),
    # divergence.py
    Metric("kl_divergence", "KL divergence", "nats", "0..inf", "the change did more harm", "standard"),
    Metric("top1_agreement", "Top-1 agreement", "share", "0..1", "more likeliest tokens stay the same", "standard"),
    Metric("accuracy_difference", "Accuracy difference", "share", "-1..1", "the change did less harm", "standard"),
    # flips.py
    Metric("routing_agreement", "Routing agreement", "share", "0..1", "more tokens go where they went", "ours"),
    Metric("forced_flips", "Forced flips", "share", "0..1", "more selections were of experts that are gone", "ours"),
    Metric("free_flips", "Free flips", "share", "0..1", "more tokens leave experts that are still there", "ours"),
    # generated_text.py
    Metric("repeated_ngrams", "Repeated n-grams", "share", "0..1", "the text repeats itself more", "arXiv 1908.04319"),
    Metric("distinct_ngrams", "Distinct n-grams", "share", "0..1", "the text varies more", "arXiv 1510.03055"),
    Metric("longest_loop", "Longest loop", "tokens", "0..T", "the text repeats itself for longer", "ours"),
    Metric("next_token_entropy", "Next-token entropy", "nats", "0..ln V", "the model decides less", "standard"),
    Metric("first_difference", "First difference", "tokens", "0..T", "both texts are alike for longer", "standard"),
    # temporal.py
    Metric("first_choice_repeat", "First-choice repeat", "share", "0..1", "neighbours agree more often", _MIXTRAL),
    Metric("overlap_repeat", "Overlap repeat", "share", "0..1", "neighbours agree more often", _MIXTRAL),
    Metric("mean_overlap", "Mean overlap", "share", "0..1", "neighbours share more experts", "ours"),
    # co_activation.py
    Metric("co_activation", "Co-activation", "share", "0..1", "the first comes with the other", _OLMOE, 1, True),
    Metric("lift", "Lift", "ratio", "0..inf", "both are used together more often", "standard"),
    Metric("jaccard", "Jaccard index", "share", "0..1", "where one is used, so is the other", "standard"),
    Metric(
        "pointwise_information",
        "Pointwise mutual information",
        "bits",
        "-inf..inf",
        "both are used together more often",
        "standard",
    ),
    Metric(
        "attraction", "Attraction", "ratio", "0..inf", "both meet more often than popularity explains", "Goodman 1968"
    ),
    Metric("pair_excess", "Pairs beyond popularity", "share", "0..1", "popularity explains fewer pairs", "ours"),
    # transitions.py
    Metric(
        "transition_information",
        "Transition information",
        "bits",
        "0..log2 E",
        "a layer's experts say more about a later layer's",
        "standard",
    ),
    Metric(
        "transition_recall",
        "Transition recall",
        "share",
        "0..1",
        "an earlier layer's experts foresee more of the choice",
        "ours",
    ),
    Metric("popularity_recall", "Popularity recall", "share", "0..1", "always fetching the same serves more", "ours"),
    # lookahead.py
    Metric("lookahead_recall", "Lookahead recall", "share", "0..1", "an early router foresees more of it", _FATE),
    Metric("lookahead_exact", "Whole choices foreseen", "share", "0..1", "more tokens need no further fetch", _FATE),
    Metric("lookahead_first_choice", "First choices foreseen", "share", "0..1", "an early router decides alike", _FATE),
    Metric("lookahead_cosine", "Lookahead cosine", "cosine", "-1..1", "what the router is given changes less", _FATE),
    *own("layer_memory"),
    *own("neighbours"),
    *own("chained_steps"),
    # specialization.py
    Metric(
        "domain_specialization", "Domain specialization", "share", "k/E..1", "domains have experts of their own", _OLMOE
    ),
    Metric(
        "domain_variation", "Domain variation", "ratio", "0..sqrt(D)", "the expert is for fewer domains", _LRC, 1, True
    ),
    Metric(
        "vocabulary_specialization", "Vocabulary specialization", "share", "k/E..1", "a token id has one expert", _OLMOE
    ),
    Metric(
        "first_choice_vocabulary",
        "First-choice vocabulary specialization",
        "share",
        "1/E..1",
        "the expert's own token ids go to it alone",
        _LRC,
    ),
    Metric(
        "specialization_correlation",
        "SRP and specialization",
        "correlation",
        "-1..1",
        "specialised experts are those that serve segments well",
        _LRC,
    ),
    *own("axis_distance"),
    *own("expert_kinds"),
    *own("shared_output"),
    # similarity.py
    Metric(
        "router_row_similarity", "Router-row similarity", "cosine", "-1..1", "the router reads more alike", _CLOSER_LOOK
    ),
    Metric(
        "router_logit_similarity",
        "Router-logit similarity",
        "correlation",
        "-1..1",
        "the router wants both for the same tokens",
        "arXiv 2310.01334",
        1,
        True,
    ),
    Metric("output_cosine", "Output cosine", "cosine", "-1..1", "the experts are more alike", "arXiv 2506.23266"),
    Metric(
        "output_product_similarity",
        "Output-product similarity",
        "cosine",
        "-1..1",
        "the experts are more alike",
        "ours",
    ),
    Metric("cka", "CKA", "ratio", "0..1", "the experts are more alike", "arXiv 1905.00414"),
    Metric("debiased_cka", "Debiased CKA", "ratio", "-1..1", "the experts are more alike", "arXiv 2010.15327"),
    Metric(
        "gated_output_similarity",
        "Weighted-output similarity",
        "cosine",
        "-1..1",
        "one stands in for the other",
        "ours",
    ),
    Metric("weight_similarity", "Weight similarity", "cosine", "-1..1", "the experts are more alike", _CLOSER_LOOK),
    Metric(
        "neuron_mean_similarity",
        "Neuron-mean similarity",
        "cosine",
        "-1..1",
        "the experts are more alike",
        _CLOSER_LOOK,
    ),
    Metric(
        "matched_weight_similarity",
        "Matched-weight similarity",
        "cosine",
        "-1..1",
        "the experts are more alike",
        _CLOSER_LOOK,
        1,
        True,
    ),
    Metric(
        "angular_similarity", "Angular similarity", "ratio", "0..1", "the experts are more alike", _CLOSER_LOOK, 1, True
    ),
    Metric("redundant_pairs", "Redundant pairs", "pairs", "0..E(E-1)/2", "more experts are alike", "ours"),
    *own("router_rows"),
    # similarity_agreement.py
    Metric(
        "similarity_agreement", "Agreement of kinds", "correlation", "-1..1", "both kinds rank pairs alike", _MANTEL
    ),
    Metric(
        "similarity_kendall",
        "Agreement of kinds in pairs",
        "correlation",
        "-1..1",
        "both kinds rank pairs alike",
        "standard",
    ),
    Metric("similarity_r_squared", "R squared of kinds", "ratio", "0..1", "one kind predicts the other", _CLOSER_LOOK),
    Metric("similarity_p_value", "Chance of agreement", "probability", "0..1", "agreement may be chance", _MANTEL),
    # comparison.py
    Metric("run_overlap", "Overlap of two runs", "share", "0..1", "both runs use more of the same experts", _OLMOE),
    Metric("same_set", "Same set", "share", "0..1", "more tokens use exactly the same experts", "standard"),
    Metric("same_first_choice", "Same first choice", "share", "0..1", "more tokens have the same top expert", _OLMOE),
    Metric("run_jaccard", "Jaccard index of two runs", "ratio", "0..1", "the selections are more alike", "standard"),
    Metric("router_saturation", "Router saturation", "share", "0..1", "routing is nearer to its final form", _OLMOE),
    Metric("flip_margin", "Margin of flips", "logits", "0..inf", "flips are no matter of rounding", "standard"),
    Metric("left_weight", "Weight that left", "share", "0..1", "flips change more of the output", "ours"),
    Metric("weight_gap", "Weight gap of flips", "share", "0..1", "flips are no matter of rounding", "ours"),
    Metric("load_moved", "Load moved", "share", "0..1", "more selections go to other experts", "standard"),
)


def metric(name: str) -> Metric:
    """The metric called ``name``; KeyError when there is none."""
    return {one.name: one for one in METRICS}[name]


__all__ = ["METRICS", "Metric", "metric", "own"]
