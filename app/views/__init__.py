"""The pages. A new page is one file here with a function ``page()``, and one line in ``PAGES``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PageInfo:
    """One page: its file beside ``main.py``, its name in the sidebar, and its address."""

    file: str
    title: str
    icon: str
    url: str


PAGES = (
    PageInfo("views/overview.py", "Overview", ":material/dashboard:", "overview"),
    PageInfo("views/routing.py", "Routing", ":material/alt_route:", "routing"),
    PageInfo("views/tokens.py", "Tokens", ":material/text_fields:", "tokens"),
    PageInfo("views/super_experts.py", "Super experts", ":material/bolt:", "super-experts"),
    PageInfo("views/local_consistency.py", "Local consistency", ":material/timeline:", "local-consistency"),
)
