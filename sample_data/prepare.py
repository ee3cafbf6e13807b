"""Collect the texts, split them by document, train the tokenizer and write token files.

`python -P -m sample_data.prepare --out DIR` downloads Debian packages into DIR/packages and writes:

- DIR/tokenizer/: the tokenizer as a Hugging Face folder;
- DIR/train.safetensors: one uint16 stream of tokens per domain, documents separated by EOS;
- sample_data/texts/<domain>.jsonl (or --texts DIR): the held-out documents, and NOTICES.txt, the copyright notices of
  those whose text no longer holds them.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sample_data import TEXTS
from sample_data.sources import (
    DOMAINS,
    HELD_OUT_LICENCES,
    MANUALS,
    PACKAGES,
    Document,
    arithmetic,
    order_of,
    package_version,
    read_package,
    unpack_packages,
)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY = 4096
MAXIMUM_CHARACTERS = 24_000  # a held-out document is no longer: a domain's text should be many documents
TOKENIZER_CHARACTERS = 2_000_000  # per domain, so that no language takes the whole vocabulary


def collect(*, scratch: Path) -> dict[str, list[Document]]:
    """Return all documents per domain."""
    found: dict[str, list[Document]] = {}
    for domain, packages in PACKAGES.items():
        found[domain] = [
            document
            for package in packages
            for document in read_package(scratch=scratch, package=package, domain=domain)
        ]
    found["arithmetic"] = [*arithmetic(seed=1, documents=3000), *arithmetic(seed=2, documents=150)]
    return found


def may_be_published(document: Document, *, english_licences: dict[str, str]) -> bool:
    """Say whether a document's own licence statement allows it among the held-out texts.

    A translated page counts under the licence its English original states; Python's files count when they carry no
    copyright notice of their own, which leaves the PSF licence of the package.
    """
    if len(document.text) > MAXIMUM_CHARACTERS:
        return False
    if document.domain == "arithmetic":
        return "seed 2" in document.stem
    if document.domain == "python":
        return not any(word in document.text for word in ("Copyright", "copyright", "(c)", "License", "license"))
    licence = english_licences.get(document.stem, "") if document.domain in MANUALS else document.licence
    return licence in HELD_OUT_LICENCES


def split(documents: dict[str, list[Document]], *, held_out_bytes: int) -> tuple[list[Document], list[Document]]:
    """Split into (training, held-out) by subject: a page held out in one language trains in none."""
    english_licences = {document.stem: document.licence for document in documents["english"]}
    candidates: dict[str, list[Document]] = defaultdict(list)
    for document in (document for domain in DOMAINS for document in documents[domain]):
        if may_be_published(document, english_licences=english_licences):
            candidates[document.stem].append(document)
    held_out: list[Document] = []
    sizes: dict[str, int] = defaultdict(int)
    seen: set[int] = set()
    for stem in sorted(candidates, key=order_of):
        for document in candidates[stem]:
            if sizes[document.domain] < held_out_bytes and is_new(document, seen=seen):
                sizes[document.domain] += len(document.text.encode())
                held_out.append(document)
    taken = {document.stem for document in held_out}
    rest = [
        document
        for domain in DOMAINS
        for document in documents[domain]
        if document.stem not in taken and not document.source.startswith("generated: seed 2")
    ]
    return [document for document in rest if is_new(document, seen=seen)], held_out


def is_new(document: Document, *, seen: set[int]) -> bool:
    """Say whether less than half of the document's long lines stood in an earlier one, and remember its lines."""
    lines = [line.strip() for line in document.text.split("\n")]
    keys = {line_key(line) for line in lines if len(line) > 24}
    if document.domain == "arithmetic":
        keys = {line_key(document.text)}
    repeated = len(keys & seen)
    seen |= keys
    return bool(keys) and repeated * 2 < len(keys)


def line_key(line: str) -> int:
    """Return 64 bits that identify a line, the same in every process (Python's own hash is not)."""
    return int.from_bytes(order_of(line), "little")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits digits and puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def tokenizer_texts(documents: Iterable[Document]) -> Iterator[str]:
    """Yield documents until each domain has given its share of characters."""
    used: dict[str, int] = defaultdict(int)
    for document in sorted(documents, key=lambda document: order_of(document.source)):
        if used[document.domain] < TOKENIZER_CHARACTERS:
            used[document.domain] += len(document.text)
            yield document.text


def token_streams(documents: Iterable[Document], *, tokenizer: PreTrainedTokenizerFast) -> dict[str, numpy.ndarray]:
    """Return per domain all training documents, shuffled, each followed by EOS: uint16 (tokens,)."""
    streams: dict[str, list[int]] = defaultdict(list)
    for document in sorted(documents, key=lambda document: order_of(document.source)):
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        streams[document.domain].extend([*ids, tokenizer.eos_token_id])
    return {domain: numpy.asarray(ids, dtype=numpy.uint16) for domain, ids in streams.items()}


def write_texts(held_out: Iterable[Document], *, folder: Path) -> None:
    """Write one JSON-lines file per domain."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        rows = [
            {"text": document.text, "domain": domain, "source": document.source}
            for document in held_out
            if document.domain == domain
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_notices(held_out: Iterable[Document], *, path: Path) -> None:
    """Write what the manuals' sources say about their authors and licences, which their plain text leaves out."""
    sources: dict[str, list[str]] = defaultdict(list)
    for document in held_out:
        if document.notice:
            sources[document.notice].append(document.source)
    blocks = ["\n".join([*(f"== {name}" for name in names), notice]) for notice, names in sources.items()]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def main() -> None:
    """Run all steps and print what each domain holds."""
    parser = argparse.ArgumentParser(
        prog="python -P -m sample_data.prepare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for packages, tokenizer and token files")
    parser.add_argument(
        "--texts", type=Path, default=TEXTS, help="folder for the held-out texts (default: %(default)s)"
    )
    parser.add_argument("--held-out-bytes", type=int, default=125_000, help="UTF-8 bytes held out per domain")
    options = parser.parse_args()
    scratch = options.out / "packages"
    scratch.mkdir(parents=True, exist_ok=True)
    unpack_packages(scratch=scratch)
    training, held_out = split(collect(scratch=scratch), held_out_bytes=options.held_out_bytes)
    tokenizer = train_tokenizer(tokenizer_texts(training))
    tokenizer.save_pretrained(options.out / "tokenizer")
    streams = token_streams(training, tokenizer=tokenizer)
    save_file(streams, options.out / "train.safetensors")
    write_texts(held_out, folder=options.texts)
    write_notices(held_out, path=options.texts / "NOTICES.txt")
    for domain in DOMAINS:
        kept = [document.text for document in held_out if document.domain == domain]
        count = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in kept)
        print(
            f"{domain}: {streams[domain].size} training tokens; {len(kept)} held-out documents, "
            f"{sum(len(text.encode()) for text in kept)} bytes, {count} tokens"
        )
    for package in sorted({name for names in PACKAGES.values() for name in names}):
        print(f"{package} {package_version(scratch=scratch, package=package)}")


if __name__ == "__main__":
    main()
