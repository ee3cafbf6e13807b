"""``open_corpus`` and what it returns: batches of token ids, each sequence with its domain and origin."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import CorpusError
from profiler.corpus.schedule import Schedule, make_schedule
from profiler.corpus.sources import ReadOptions, Source, resolve
from profiler.corpus.tokens import Cutter, adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCHES_SORTED = 16  # batches whose sequences are sorted by length together
BYTES_PER_TOKEN = 16  # generous: a document cut from a long text file fills several sequences
FILES_LISTED = 100


@dataclass(frozen=True)
class TokenBatch:
    """B sequences, padded on the right to the longest of them (T)."""

    input_ids: NDArray[np.int64]  # (B, T)
    attention_mask: NDArray[np.int64]  # (B, T), 0 = padding
    special: NDArray[np.bool_]  # (B, T), special tokens of the tokenizer; False on padding
    sequences: NDArray[np.int64]  # (B,), ids within the corpus
    domains: list[str]  # (B,)
    sources: list[str]  # (B,), file, file@byte or file#row of the first token


@dataclass(frozen=True)
class CorpusOptions:
    """What the user asked for; recorded with the run."""

    sequence_length: int
    batch_size: int
    token_budget: int | None
    domain_column: str
    text_column: str
    bos: bool
    packing: bool
    chat_template: bool
    roles: list[str] | None
    seed: int
    split: str
    generation_prompt: bool = False


class Corpus:
    """Sequences in a fixed order. Made by :func:`open_corpus`."""

    def __init__(
        self, sources: list[Source], skipped: list[str], schedule: Schedule, cutter: Cutter, options: CorpusOptions
    ) -> None:
        self._sources, self._skipped, self._schedule, self._cutter = sources, skipped, schedule, cutter
        self.options = options

    @property
    def domains(self) -> list[str]:
        """Labels of the domains that are fed, in the order of their first sequence."""
        return list(dict.fromkeys(self._schedule.domains))

    @property
    def num_sequences(self) -> int:
        return len(self._schedule.domains)

    @property
    def num_tokens(self) -> int:
        """Tokens that are fed: BOS and other special tokens included, padding not."""
        return len(self._schedule.tokens)

    @property
    def documents(self) -> int:
        """Documents of which at least a part is fed."""
        return self._schedule.documents.total()

    @property
    def sha256(self) -> str:
        """Hash over the token ids fed, in order: equal for two corpora that feed the same sequences."""
        return self._schedule.sha256

    @property
    def warnings(self) -> list[str]:
        """What a user should know before trusting figures from this corpus, one sentence each."""
        tokenizer, cutter = self._cutter.tokenizer, self._cutter
        found = []
        if self._schedule.domains_without_tokens:
            names = ", ".join(self._schedule.domains_without_tokens[:5])
            found.append(f"domains without a token: {names}; they are empty or the token budget is too small for them")
        if getattr(tokenizer, "chat_template", None) and cutter.plain_texts:
            found.append("plain text is fed though the tokenizer has a chat template: an instruct model sees messages")
        if cutter.bos is not None and not adds_bos(tokenizer):
            found.append("each sequence begins with a BOS that the tokenizer does not add by itself")
        if self._skipped:
            found.append(f"{len(self._skipped)} files were skipped as not readable, such as {self._skipped[0]}")
        return found

    def describe(self) -> dict[str, Any]:
        """Provenance as JSON values: files, options, documents, sequences and tokens per domain, hash, warnings."""
        schedule, cutter = self._schedule, self._cutter
        token = cutter.tokenizer.convert_ids_to_tokens
        return {
            **asdict(self.options),
            "files": [source.name for source in self._sources[:FILES_LISTED]],
            "num_files": len(self._sources),
            "files_skipped": len(self._skipped),
            "bos_token": None if cutter.bos is None else token(cutter.bos),
            "bos_added_by_tokenizer": adds_bos(cutter.tokenizer),
            "separator_token": None if cutter.separator is None else token(cutter.separator),
            "messages_per_role": dict(sorted(schedule.roles.items())),
            "domains": {
                domain: {
                    "documents": schedule.documents[domain],
                    "sequences": schedule.domains.count(domain),
                    "tokens": schedule.tokens_fed[domain],
                }
                for domain in self.domains
            },
            "documents": self.documents,
            "sequences": self.num_sequences,
            "tokens": self.num_tokens,
            "dropped": dict(cutter.dropped),
            "corpus_sha256": self.sha256,
            "warnings": self.warnings,
        }

    def batches(self, skip: AbstractSet[int] = frozenset()) -> Iterator[TokenBatch]:
        """Batches of similar lengths, the longest of each window of 16 batches first (memory runs out early or never).

        Batches are formed before the sequences in ``skip`` are left out: a resumed run sees the batches that an
        uninterrupted run would have seen.
        """
        for planned in self.plan():
            sequences = [sequence for sequence in planned if sequence not in skip]
            if sequences:
                yield self.batch(sequences)

    def plan(self) -> Iterator[list[int]]:
        """The numbers of the sequences of each batch, in the order of :meth:`batches`."""
        size = self.options.batch_size
        lengths = self.lengths
        for first in range(0, self.num_sequences, size * BATCHES_SORTED):
            window = lengths[first : first + size * BATCHES_SORTED]
            order = first + np.argsort(-window, kind="stable")
            for start in range(0, len(order), size):
                yield order[start : start + size].tolist()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(sequences,) tokens of each."""
        return np.diff(self._schedule.starts)

    def batch(self, sequences: list[int]) -> TokenBatch:
        """These sequences as one batch."""
        schedule, tokenizer = self._schedule, self._cutter.tokenizer
        rows = [schedule.tokens[schedule.starts[i] : schedule.starts[i + 1]] for i in sequences]
        padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
        input_ids = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = row
            attention_mask[i, : len(row)] = 1
        return TokenBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            special=self._cutter.is_special(input_ids) & (attention_mask == 1),
            sequences=np.array(sequences, dtype=np.int64),
            domains=[schedule.domains[i] for i in sequences],
            sources=[schedule.origins[i] for i in sequences],
        )


def open_corpus(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int = 512,
    batch_size: int = 8,
    token_budget: int | None = None,
    domains: Mapping[str, str] | None = None,
    domain_column: str = "domain",
    text_column: str = "text",
    bos: bool = True,
    packing: bool = False,
    chat_template: bool = True,
    roles: Collection[str] | None = None,
    seed: int = 0,
    split: str = "train",
    generation_prompt: bool = False,
) -> Corpus:
    """Read text, JSON Lines (``.gz`` too), Parquet, folders, globs or ``hf:NAME[:CONFIG]`` as sequences of tokens.

    The domain of a document is its label in ``LABEL=PATH`` or ``domains`` (path -> label), else its ``domain_column``,
    else the first subfolder beneath a folder that was given, else the file's stem. A list of chat messages in
    ``text_column`` (or in a column ``messages``) goes through the tokenizer's chat template; ``roles`` keeps only the
    messages of these roles. ``token_budget`` counts every token that is fed, is met to the token and is spread evenly
    over the domains; without it everything is read. ``split`` is that of a hub dataset. ``generation_prompt`` puts
    chats that end with the user's turn into the form in which the model is asked for an answer.

    The same arguments and files give the same sequences with the same ids, wherever the files lie; ``batch_size``
    only groups them. Raises CorpusError, one line, for input that cannot be read or options that cannot be met.
    """
    if batch_size < 1:
        raise CorpusError(f"batch_size is {batch_size}: give 1 or more")
    cutter = Cutter(
        tokenizer,
        sequence_length=sequence_length,
        bos=bos,
        packing=packing,
        chat_template=chat_template,
        roles=roles,
        generation_prompt=generation_prompt,
    )
    if token_budget is not None and token_budget < sequence_length:
        raise CorpusError(f"token_budget is {token_budget}, less than one sequence of {sequence_length}: raise it")
    sources, skipped = resolve(paths, domains)
    reading = ReadOptions(text_column, domain_column, split, max(1 << 14, BYTES_PER_TOKEN * sequence_length))
    schedule = make_schedule(sources, cutter=cutter, options=reading, token_budget=token_budget, seed=seed)
    options = CorpusOptions(
        sequence_length=sequence_length,
        batch_size=batch_size,
        token_budget=token_budget,
        domain_column=domain_column,
        text_column=text_column,
        bos=bos,
        packing=packing,
        chat_template=chat_template,
        roles=None if roles is None else sorted(roles),
        seed=seed,
        split=split,
        generation_prompt=generation_prompt,
    )
    return Corpus(sources, skipped, schedule, cutter, options)
