"""Where the texts come from: Debian packages, the files taken from them, and a generator of arithmetic."""

import gzip
import hashlib
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sample_data.roff import plain_text

PACKAGES = {
    "python": ("libpython3.11-minimal", "libpython3.11-stdlib"),
    "c": ("linux-libc-dev", "libc6-dev"),
    "english": ("manpages", "manpages-dev", "git-man"),
    "german": ("manpages-de", "manpages-de-dev"),
    "french": ("manpages-fr", "manpages-fr-dev"),
    "japanese": ("manpages-ja", "manpages-ja-dev"),
}
MANUALS = ("english", "german", "french", "japanese")
DOMAINS = (*PACKAGES, "arithmetic")
UNWANTED = ("/encodings/", "/pydoc_data/", "/config-3.11", "/sitecustomize")  # tables and topics, not programs
# The only licences that a held-out page or header may state; everything else is used for training at most.
HELD_OUT_LICENCES = (
    "Linux-man-pages-copyleft",
    "GPL-1.0-or-later",
    "GPL-2.0-only",
    "GPL-2.0-or-later",
    "BSD-3-Clause",
    "MIT",
    "GPL-2.0 WITH Linux-syscall-note",
    "GPL-2.0-only WITH Linux-syscall-note",
    "GPL-2.0+ WITH Linux-syscall-note",
    "GPL-1.0+ WITH Linux-syscall-note",
    "GPL-2.0-or-later WITH Linux-syscall-note",
)


@dataclass(frozen=True)
class Document:
    """One text; `stem` names its subject in every language.

    `licence` is the SPDX expression the file states, `notice` the comments at the head of a manual's source, with its
    copyright lines; both may be "".
    """

    text: str
    domain: str
    source: str
    stem: str
    licence: str
    notice: str = ""


def unpack_packages(*, scratch: Path) -> None:
    """Download every package with apt into `scratch` and unpack it to `scratch/<package>`."""
    for package in sorted({name for names in PACKAGES.values() for name in names}):
        folder = scratch / package
        if not folder.exists():
            subprocess.run(["apt-get", "download", package], cwd=scratch, check=True, capture_output=True)
            archive = next(scratch.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", archive, folder], check=True)


def package_version(*, scratch: Path, package: str) -> str:
    """Return the version of a downloaded package, as its archive states it."""
    archive = next(scratch.glob(f"{package}_*.deb"))
    query = ["dpkg-deb", "-f", str(archive), "Version"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()


def stated_licence(source: str) -> str:
    """Return the SPDX expression a file states, without comment signs and brackets; "" if it states none."""
    match = re.search(r"SPDX-License-Identifier:\s*(.+)", source)
    return match[1].replace("*/", "").strip(" ()") if match else ""


def head_comments(source: str) -> str:
    """Return the roff comments before a manual's title, without their signs: copyright, licence, translators."""
    head = source.split("\n.TH", maxsplit=1)[0]
    lines = [line[3:].strip() for line in head.split("\n") if line[1:3] == '\\"' and line[:1] in ".'"]
    return re.sub(r"\n{2,}", "\n", "\n".join(line for line in lines if not set(line) <= set("*-"))).strip()


def clean(text: str, *, domain: str) -> str:
    """Drop what does not belong to the domain: untranslated paragraphs of Japanese pages, trailing blanks."""
    lines = [line.rstrip() for line in text.expandtabs(8).split("\n")]
    if domain == "japanese":
        lines = [line for line in lines if len(line) < 60 or any(ord(character) > 0x2E80 for character in line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def read_package(*, scratch: Path, package: str, domain: str) -> Iterator[Document]:
    """Yield the package's documents in the order of their paths: symlinks, includes and tables are left out."""
    root = scratch / package
    pattern = {"python": "*.py", "c": "*.h"}.get(domain, "*.gz")
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or any(part in f"/{name}" for part in UNWANTED):
            continue
        if domain in MANUALS and "/man/" not in name:
            continue
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        source = data.decode("utf-8", errors="replace")
        text = clean(plain_text(source) if domain in MANUALS else source, domain=domain)
        if len(text) > 400 and "\ufffd" not in text:
            stem = path.name.removesuffix(".gz") if domain in MANUALS else name
            notice = head_comments(source) if domain in MANUALS else ""
            yield Document(text, domain, f"{package}: {name}", stem, stated_licence(source), notice)


def arithmetic(*, seed: int, documents: int) -> Iterator[Document]:
    """Yield generated sheets of exercises: sums, products, divisions, series and comparisons with their answers."""
    generator = random.Random(seed)
    for index in range(documents):
        kinds = generator.sample(EXERCISES, k=2)
        lines = [generator.choice(kinds)(generator) for _ in range(generator.randint(20, 60))]
        name = f"seed {seed}, sheet {index}"
        yield Document("\n".join(lines) + "\n", "arithmetic", f"generated: {name}", name, "")


def sum_exercise(generator: random.Random) -> str:
    """Return one addition or subtraction."""
    first, second = generator.randint(0, 999), generator.randint(0, 99)
    return generator.choice((f"{first} + {second} = {first + second}", f"{first} - {second} = {first - second}"))


def product_exercise(generator: random.Random) -> str:
    """Return one multiplication of small numbers."""
    first, second = generator.randint(2, 20), generator.randint(2, 12)
    return f"{first} * {second} = {first * second}"


def division_exercise(generator: random.Random) -> str:
    """Return one division with remainder."""
    first, second = generator.randint(2, 150), generator.randint(2, 12)
    return f"{first} / {second} = {first // second} remainder {first % second}"


def series_exercise(generator: random.Random) -> str:
    """Return one arithmetic series of six terms."""
    start, step = generator.randint(0, 50), generator.randint(1, 12)
    return "series: " + ", ".join(str(start + step * index) for index in range(6))


def comparison_exercise(generator: random.Random) -> str:
    """Return one comparison."""
    first, second = generator.randint(0, 999), generator.randint(0, 999)
    sign = "<" if first < second else ">" if first > second else "="
    return f"{first} {sign} {second}, the larger is {max(first, second)}"


EXERCISES = (sum_exercise, product_exercise, division_exercise, series_exercise, comparison_exercise)


def order_of(stem: str) -> bytes:
    """Return the key by which stems are shuffled: the same on every machine."""
    return hashlib.blake2b(stem.encode(), digest_size=8).digest()
