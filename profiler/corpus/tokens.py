"""Documents to pieces: token ids of at most one sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import CorpusError
from profiler.corpus.sources import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNBOUNDED = 10**9  # tokenizers that know no longest input name a number far beyond this


@dataclass(frozen=True)
class Piece:
    """Token ids that become one sequence."""

    ids: NDArray[np.uint32]  # (tokens,)
    origin: str  # of the document its first token comes from
    begun: tuple[tuple[str, ...], ...]  # documents that begin here, each as the roles of its messages (none for text)


@dataclass
class Stream:
    """Token ids of one domain that wait to be cut."""

    ids: list[int] = field(default_factory=list)
    origin: str = ""
    begun: list[tuple[str, ...]] = field(default_factory=list)


class Cutter:
    """Turns documents into pieces of at most ``sequence_length`` tokens.

    With ``bos`` each piece begins with the tokenizer's BOS, if it has one; a BOS that a chat template wrote is not
    doubled. With ``packing`` the documents of a domain follow one another, an EOS between them, without it each
    document begins a piece. With ``generation_prompt`` a chat that ends with the user's turn is followed by what the
    template puts before an answer. Pieces that hold nothing but special tokens are dropped and counted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequence_length: int,
        bos: bool,
        packing: bool,
        chat_template: bool,
        roles: Collection[str] | None,
        generation_prompt: bool = False,
    ) -> None:
        longest = tokenizer.model_max_length
        if sequence_length < 2:
            raise CorpusError(f"sequence_length is {sequence_length}: a sequence needs at least 2 tokens")
        if sequence_length > longest and longest < UNBOUNDED:
            raise CorpusError(f"sequence_length is {sequence_length}, but the tokenizer allows {longest}: lower it")
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.bos: int | None = _token_id(tokenizer.bos_token_id) if bos else None
        self.separator: int | None = _token_id(tokenizer.eos_token_id) if packing else None
        self.packing = packing
        self.chat_template = chat_template
        self.roles = roles
        self.generation_prompt = generation_prompt
        self.special_ids = special_ids(tokenizer)
        self.dropped: Counter[str] = Counter(documents_without_text=0, sequences_without_text=0)
        self.plain_texts = 0
        self.chats = 0

    def add(self, documents: Sequence[Document], stream: Stream) -> Iterator[Piece]:
        """Append documents to a stream and cut off the pieces that are complete."""
        chosen = [(document, *self._render(document)) for document in documents]
        kept = [entry for entry in chosen if entry[1].strip()]
        self.dropped["documents_without_text"] += len(chosen) - len(kept)
        for (document, _, roles), ids in zip(kept, self._encode([text for _, text, _ in kept]), strict=True):
            if not stream.ids:
                stream.origin = document.origin
            stream.ids += ids
            stream.begun.append(roles)
            if self.separator is not None:
                stream.ids.append(self.separator)
            yield from self.cut(stream, flush=not self.packing)
            stream.origin = document.origin

    def cut(self, stream: Stream, *, flush: bool) -> Iterator[Piece]:
        """Cut full pieces off a stream; with ``flush`` the rest as well."""
        at = 0
        while at < len(stream.ids):
            added = [self.bos] if self.bos is not None and stream.ids[at] != self.bos else []
            end = at + self.sequence_length - len(added)
            if end > len(stream.ids) and not flush:
                break
            ids = np.array(added + stream.ids[at:end], dtype=np.uint32)
            at = end
            if self.is_special(ids).all():
                self.dropped["sequences_without_text"] += 1
                continue
            yield Piece(ids, stream.origin, tuple(stream.begun))
            stream.begun = []
        del stream.ids[:at]

    def is_special(self, ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Which ids are special tokens of the tokenizer; same shape as ``ids``."""
        return np.isin(ids, self.special_ids)

    def _render(self, document: Document) -> tuple[str, tuple[str, ...]]:
        """The text of a document, and the roles of its messages if it is a chat."""
        if isinstance(document.content, str):
            self.plain_texts += 1
            return document.content, ()
        self.chats += 1
        messages = [message for message in document.content if self.roles is None or message["role"] in self.roles]
        roles = tuple(message["role"] for message in messages)
        if not messages:
            return "", ()
        if not self.chat_template:
            return "\n\n".join(str(message["content"] or "") for message in messages), roles
        if not getattr(self.tokenizer, "chat_template", None):
            raise CorpusError(
                f"{document.origin} holds chat messages, but the tokenizer has no chat template:"
                " use the instruct model's tokenizer, or turn chat_template off to feed the bare contents"
            )
        try:
            asks = self.generation_prompt and roles[-1] == "user"
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
            return str(text), roles
        except Exception as error:  # templates are programs: they raise what they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CorpusError(
                f"{document.origin}: the chat template refuses these messages ({reason}):"
                f" their roles are {', '.join(roles)}"
            ) from None

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Ids of all special tokens, the named ones (BOS, EOS, ...) and those a chat template uses; sorted."""
    try:
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    except NotImplementedError:  # mistral-common names all of them below
        added = set()
    return np.array(sorted(added | set(tokenizer.all_special_ids)), dtype=np.int64)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS before a text when nobody asks."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _token_id(value: Any) -> int | None:
    return None if value is None else int(value[0] if isinstance(value, list) else value)
