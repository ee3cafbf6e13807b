"""The pages. A new page is one file here with a function ``page(run)``, and one line in ``PAGES``.

Small pages may hold their frame, figure and exhibits themselves (``EXHIBITS``, announced by ``exhibits=True``); what
several pages show is in ``app/frames/``, ``app/figures/`` and ``app/exhibits/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PageInfo:
    """One page: its file, its name in the sidebar, and its address (the first page is the root).

    exhibits: whether the file ends with ``EXHIBITS`` of its own, for the report and ``moescope figure``.
    """

    file: str
    title: str
    icon: str
    url: str
    exhibits: bool = False


def _file(name: str) -> str:
    return str(Path(__file__).with_name(f"{name}.py"))


PAGES = (
    PageInfo(_file("overview"), "Overview", ":material/dashboard:", "overview"),
    PageInfo(_file("routing"), "Routing", ":material/alt_route:", "routing"),
    PageInfo(_file("architecture"), "Architecture", ":material/account_tree:", "architecture"),
    PageInfo(_file("tokens"), "Tokens", ":material/text_fields:", "tokens"),
    PageInfo(_file("expert"), "Expert", ":material/person_search:", "expert"),
    PageInfo(_file("super_experts"), "Super experts", ":material/bolt:", "super-experts"),
    PageInfo(_file("local_consistency"), "Local consistency", ":material/timeline:", "local-consistency"),
    PageInfo(_file("similarity"), "Similarity", ":material/join_inner:", "similarity"),
    PageInfo(_file("compare"), "Compare", ":material/compare_arrows:", "compare"),
    PageInfo(_file("compress"), "Compress", ":material/compress:", "compress"),
    PageInfo(_file("cache"), "Cache", ":material/memory:", "cache"),
    PageInfo(_file("placement"), "Placement", ":material/grid_view:", "placement"),
    PageInfo(_file("what_if"), "What-if routing", ":material/tune:", "what-if"),
    PageInfo(_file("data"), "Data", ":material/database:", "data"),
)
