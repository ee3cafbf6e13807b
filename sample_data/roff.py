"""Man pages as plain text: enough of roff's man macros to read a manual, none of mdoc or tables."""

import re

ESCAPED_CHARACTERS = {
    "aq": "'",
    "bu": "*",
    "co": "(c)",
    "cq": "'",
    "dq": '"',
    "em": " - ",
    "en": "-",
    "ga": "`",
    "ha": "^",
    "hy": "-",
    "lq": '"',
    "oq": "'",
    "rq": '"',
    "rs": "\\",
    "ti": "~",
    "Bq": ",,",
    "Fo": "«",
    "Fc": "»",
    "->": "->",
    "<-": "<-",
    "mu": "x",
    "ua": "^",
    "<=": "<=",
    ">=": ">=",
    "+-": "+-",
    "mc": "µ",
}
FONT_MACROS = {"B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB", "R"}
PARAGRAPH_MACROS = {"PP", "P", "LP", "HP", "TP", "IP", "TQ", "RS", "RE", "sp", "br", "SY", "YS", "EX", "EE", "nf", "fi"}
LITERAL_STARTS, LITERAL_ENDS = {"nf", "EX", "SY"}, {"fi", "EE", "YS"}
SKIPPED_BLOCKS = {"TS": "TE", "EQ": "EN", "de": ".", "ig": ".", "ie": "el"}


def unescape(text: str) -> str:
    """Replace roff's escape sequences in one line by the characters they print."""
    text = re.sub(r'\\["#].*$', "", text)
    text = re.sub(r"\\f(\[[^\]]*\]|\(..|.)|\\s[-+]?\d+|\\[hvwlLDo]'[^']*'|\\[mkn](\[[^\]]*\]|\(..|.)", "", text)
    text = re.sub(r"\\u([0-9A-F]{4})", lambda match: chr(int(match[1], 16)), text)
    text = re.sub(r"\\[(\[]u([0-9A-F]{4})\]?", lambda match: chr(int(match[1], 16)), text)
    text = re.sub(r"\\\((..)|\\\[([^\]]*)\]", lambda match: ESCAPED_CHARACTERS.get(match[1] or match[2], ""), text)
    text = re.sub(r"\\\*(\[[^\]]*\]|\(..|.)", "", text)
    text = re.sub(r"\\[&:/,|^%!dpuacrtz)]", "", text)
    text = text.replace("\\-", "-").replace("\\ ", " ").replace("\\~", " ").replace("\\0", " ")
    return text.replace("\\e", "\\").replace("\\\\", "\\").replace("\\'", "'").replace("\\`", "`").replace("\\.", ".")


def arguments(rest: str) -> list[str]:
    """Split a macro's arguments: blanks separate, double quotes group."""
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)', rest)
    return [unescape(quoted.replace('""', '"') if quoted else bare) for quoted, bare in found]


class Page:
    """The text of one page while its lines are read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.paragraph: list[str] = []
        self.literal = False

    def add(self, text: str) -> None:
        """Add a line of running text, or of a literal block."""
        if self.literal:
            self.lines.append(text.rstrip())
        elif text.strip():
            self.paragraph.append(text.strip())

    def flush(self) -> None:
        """End the paragraph: its source lines become one line, joined as the script wants (no blank between kana)."""
        joined = ""
        for part in self.paragraph:
            both_wide = joined and ord(joined[-1]) > 0x2E80 and ord(part[0]) > 0x2E80
            joined += part if not joined or both_wide else " " + part
        if joined:
            self.lines.append(joined)
        self.paragraph = []

    def command(self, name: str, rest: str) -> None:
        """Carry out one man macro; unknown macros print nothing."""
        values = arguments(rest)
        if name in FONT_MACROS:
            alternating = len(name) == 2 and name not in {"SM", "SB"}
            self.add(("" if alternating else " ").join(values))
        elif name in {"SH", "SS"}:
            self.flush()
            self.literal = False
            self.lines.extend(["", " ".join(values)])
        elif name in PARAGRAPH_MACROS:
            self.flush()
            if name == "IP" and values:
                self.paragraph.append(values[0])
            if name in {"PP", "P", "LP", "sp", "EX", "nf"}:
                self.lines.append("")
            self.literal = name in LITERAL_STARTS or (self.literal and name not in LITERAL_ENDS)


def plain_text(source: str) -> str:
    """Return the page's plain text; empty when the page is an include or uses mdoc macros."""
    if re.search(r"^\.(so|Dd)\b", source, flags=re.MULTILINE):
        return ""
    page = Page()
    skip_until = ""
    for line in source.replace("\\\n", "").split("\n"):
        match = re.match(r"^[.']\s*([A-Za-z]+|\.)?(.*)$", line)
        if skip_until:
            if match and match[1] == skip_until:
                skip_until = ""
        elif not match:
            page.add(unescape(line))
            if not line.strip():
                page.flush()
        elif match[1] in SKIPPED_BLOCKS:
            skip_until = SKIPPED_BLOCKS[match[1]]
        elif match[1]:
            page.command(match[1], match[2].strip())
    page.flush()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(page.lines)).strip() + "\n"
