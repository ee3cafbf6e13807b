"""The words that a report uses, each explained in a sentence."""

from __future__ import annotations

WORDS = {
    "MoE layer": "A decoder layer whose feed-forward part is a mixture of experts; numbered as in the checkpoint.",
    "expert": "One of the feed-forward networks between which a MoE layer chooses for each token.",
    "shared expert": "An expert that every token uses, beside the routed ones.",
    "router": "The small matrix that scores all experts of a layer for a token.",
    "top-k": "How many experts a token uses in each layer.",
    "selection": "The experts that the model really used for a token, the largest gate weight first.",
    "gate weight": "The weight with which an expert's output enters the sum.",
    "router probability": "An expert's score over all experts of the layer, before the selection.",
    "domain": "The label of a text, such as code or german; every figure can be read per domain.",
    "load": "How many selections an expert gets.",
    "MaxVio": "By how much the busiest expert exceeds the mean load: 0 is even, 1 is twice the mean.",
    "Gini": "A measure of unevenness: 0 where all experts get the same, near 1 where one gets everything.",
    "effective experts": "The number of evenly used experts that would have the same entropy of load.",
    "dead expert": "An expert that no token of this text used.",
    "entropy": "How undecided the router is: 0 where one expert has all probability.",
    "margin": "The distance between two router logits, such as the last expert taken and the first one rejected.",
    "SRP": "Segment routing best performance: how well one fixed group of experts can serve a stretch of neighbouring "
    "tokens, as an F1 score; higher means that neighbours share experts.",
    "SCH": "Segment cache best hit rate: what a cache hits that may be filled anew for each segment, knowing it.",
    "LRU": "A cache that drops the expert that was used longest ago.",
    "LFU": "A cache that drops the expert that was used least often.",
    "Belady": "The cache that knows the future: no policy hits more.",
    "popularity": "What remains of a pattern when the order of tokens is shuffled: some experts are simply used more.",
    "shuffled": "A control: the same figure after tokens (or labels) were put in random order.",
    "super expert": "An expert whose extreme outputs feed the massive activations of the model.",
    "massive activation": "A value of the residual stream that exceeds the others by orders of magnitude.",
    "residual stream": "The hidden state that all layers read from and add to.",
    "attention sink": "Attention that falls on the first token whatever the text is.",
    "CKA": "Centred kernel alignment: how alike two sets of outputs are, whatever their rotation and scale.",
    "REAP": "An importance score: mean of gate weight times norm of the output over the tokens that used the expert.",
    "EAN": "An importance score: sum of the norms of an expert's outputs.",
    "specialization": "How much more an expert serves one kind of text or token than others.",
    "importance": "A score by which plans decide what to cut: the larger, the more to be kept.",
    "plan": "What to do to a checkpoint or an engine, as a file; made from a run.",
    "KL divergence": "How far the next-token distribution has moved, in nats per token: 0 is no change.",
    "perplexity": "The exponential of the mean loss per token: lower is better.",
    "calibration": "Text that a method looks at to decide what to cut or how to quantize.",
    "interval": "Where a figure lies in 95 of 100 redraws of the sequences, unless said otherwise.",
    "fingerprint": "SHA-256 over names, shapes, types and samples of the weights: the same weights, the same value.",
}


def used_in(text: str) -> list[tuple[str, str]]:
    """The words that occur in a text, with their explanations, in alphabetical order."""
    lower = text.lower()
    return sorted(
        ((word, meaning) for word, meaning in WORDS.items() if word.lower() in lower), key=lambda item: item[0].lower()
    )
