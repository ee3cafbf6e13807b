"""Text in, token batches with domain labels out.

::

    corpus = open_corpus(["code=src/", "german.txt", "tickets.jsonl"], tokenizer=tokenizer, token_budget=100_000)
    for batch in corpus.batches(skip=set()):
        model(input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask))

``sources`` finds the files, ``readers`` turns them into documents, ``tokens`` turns documents into pieces of at most
one sequence, ``schedule`` spreads the token budget over the domains, ``corpus`` groups the result into batches.
"""

from profiler.corpus.corpus import Corpus, TokenBatch, open_corpus

__all__ = ["Corpus", "TokenBatch", "open_corpus"]
