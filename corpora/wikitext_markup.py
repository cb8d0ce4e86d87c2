"""Wikipedia's markup to plain text: what a reader of the page would read as prose, one paragraph a line.

Kept: sentences, headings that stand over kept sentences, the words of links, and the few inline templates without which
a sentence has a hole (quantities, foreign words, dashes). Dropped: references, tables, boxes, pictures, galleries,
lists of names or links, closing sections, and every paragraph with a formula.
"""

import re
from typing import Any

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Tag, Template, Text, Wikilink

__all__ = ["plain_text"]

HOLE = "\ufffc"  # stands for what plain text cannot show; its paragraph is dropped
DROPPED_TAGS = {"ref", "references", "table", "gallery", "source", "syntaxhighlight", "timeline", "imagemap", "score",
                "hr", "td", "tr", "th"}  # fmt: skip
DROPPED_NAMESPACES = re.compile(
    r"\s*:?\s*(file|image|media|category|template|portal|wikipedia|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE
)
DROPPED_SECTIONS = {
    "references", "notes", "external links", "see also", "further reading", "bibliography", "sources", "footnotes",
    "citations", "works cited", "gallery", "notes and references", "references and notes", "publications", "works",
    "filmography", "discography", "footnotes and references", "selected bibliography", "literature", "related topics",
    "notes and citations", "general references", "links",
}  # fmt: skip
# Templates that stand for words of a sentence: which positional argument holds them (0 is the first).
WORDS_OF = {
    "lang": 1, "rtl-lang": 1, "transl": -1, "nihongo": 0, "script": -1, "script/arabic": 0, "unicode": 0, "nq": 0,
    "polytonic": 0, "ipa": 0, "angbr": 0, "quote": 0, "blockquote": 0, "cquote": 0, "vanchor": 0, "visible anchor": 0,
    "nowrap": 0, "smaller": 0, "small": 0, "big": 0, "large": 0, "sc": 0, "em": 0, "strong": 0, "abbr": 0, "tooltip": 0,
    "railgauge": 0, "linktext": 0, "interlanguage link": 0, "ill": 0, "ill2": 1, "not a typo": 0,
}  # fmt: skip
SYMBOLS = {
    "mdash": "—", "mdashb": "—", "ndash": "–", "dash": " – ", "snd": " – ", "spnd": " – ", "spaced ndash": " – ",
    "nbsp": " ", "spaces": " ", "thinsp": " ", "'": "'", "'s": "'s", "' \"": "'\"", "·": " · ", "c.": "c.",
    "circa": "c. ",
}  # fmt: skip
JOINED = {"chem", "chem2"}  # {{chem|H|2|O}}: the arguments side by side
# Words of the sentence that plain text cannot show, or that only Wikipedia's software can compute.
NOT_TEXT = {
    "math", "mvar", "frac", "sfrac", "eqm", "su", "val", "overline", "radic", "e", "sup sub", "subsup", "carbon",
    "hydrogen", "dentalformula", "music", "coord", "age", "currentyear", "inflation", "format price", "us$",
    "pop density", "bibleref", "cite quran", "us patent", "ipaslink", "vr",
}  # fmt: skip
RANGE_WORDS = {"to", "-", "–", "and", "or", "x", "by", "×", "to(-)", "and(-)", "+/-", "±"}
UNITS = {"km2": "km²", "mi2": "sq mi", "sqmi": "sq mi", "m2": "m²", "sqft": "sq ft", "F": "°F", "C": "°C", "m3": "m³",
         "cuft": "cu ft", "km3": "km³", "sqkm": "km²", "nmi": "nautical miles", "acre": "acres", "mi": "miles",
         "ft": "feet", "in": "inches", "lb": "pounds", "usgal": "gallons", "U.S.gal": "gallons"}  # fmt: skip

SPACES = [
    (re.compile(r"[ \t\u00a0\u2009\u200a\u202f]+"), " "),
    (re.compile(r"(?<=\w)'''s\b"), "'s"),  # an italic name in the possessive
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"\([\s,;:/–—-]*\)"), ""),  # what a dropped pronunciation leaves
    (re.compile(r"\((?:\s*[,;:/]\s*)+"), "("),
    (re.compile(r"(?:\s*[,;:/]\s*)+\)"), ")"),
    (re.compile(r"\(\s+"), "("),
    (re.compile(r"\s+\)"), ")"),
    (re.compile(r" +([,.;:!?])(?=\s|$)"), r"\1"),
    (re.compile(r",(\s*[,;])+"), ","),
    (re.compile(r",\s*\."), "."),
    (re.compile(r" {2,}"), " "),
]
LEFTOVERS = re.compile(r"\[\[|\]\]|\{|\}|\||<|>|https?:|www\.|thumb|File:|Image:|__|ISBN|&\w+;|^[=*#:;!]|==|"
                       r"\b(px|colspan|rowspan)\b|" + HOLE)  # fmt: skip
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")
SHORTEST_PARAGRAPH = 50  # characters; below it stand names, captions and remains of lists


def plain_text(title: str, markup: str) -> str:
    """The prose of one article, with its title and headings, paragraphs parted by an empty line; "" if none is left."""
    article = mwparserfromhell.parse(markup, skip_style_tags=True)
    kept = [title]
    open_headings: list[tuple[int, str]] = []  # headings not yet followed by a kept paragraph
    skipped_level = 0  # level of the dropped section that we are in, 0 outside
    for section in article.get_sections(flat=True, include_lead=True):
        headings = section.filter_headings(recursive=False)
        if headings:
            heading = headings[0]
            name = _tidy(_render(heading.title.nodes))
            if skipped_level and heading.level > skipped_level:
                continue
            skipped_level = heading.level if name.lower() in DROPPED_SECTIONS else 0
            open_headings = [(level, text) for level, text in open_headings if level < heading.level]
            if skipped_level:
                continue
            open_headings.append((heading.level, name))
        body = _render(node for node in section.nodes if node not in headings)
        paragraphs = [line for line in map(_tidy, body.split("\n")) if _is_prose(line)]
        if paragraphs:
            kept += [text for _, text in open_headings if text and not LEFTOVERS.search(text)]
            open_headings = []
            kept += paragraphs
    return "\n\n".join(kept) if len(kept) > 1 else ""


def _is_prose(line: str) -> bool:
    return len(line) >= SHORTEST_PARAGRAPH and bool(SENTENCE_END.search(line)) and not LEFTOVERS.search(line)


def _tidy(line: str) -> str:
    for pattern, replacement in SPACES:
        line = pattern.sub(replacement, line)
    return line.strip().lstrip("*#:; ")


def _render(nodes: Any) -> str:
    return "".join(map(_render_node, nodes))


def _render_node(node: Any) -> str:
    if isinstance(node, Text):
        return str(node.value)
    if isinstance(node, HTMLEntity):
        return str(node.normalize())
    if isinstance(node, Wikilink):
        if DROPPED_NAMESPACES.match(str(node.title)):
            return ""
        return _render((node.text or node.title).nodes)
    if isinstance(node, ExternalLink):
        return _render(node.title.nodes) if node.title is not None else ""
    if isinstance(node, Template):
        return _render_template(node)
    if isinstance(node, Tag):
        return _render_tag(node)
    return ""  # comments, arguments, headings inside other nodes


def _render_tag(tag: Any) -> str:
    name = str(tag.tag).strip().lower()
    if name in DROPPED_TAGS:
        return ""
    if name in ("math", "ce"):
        return HOLE
    if name in ("br", "p", "div", "blockquote", "poem"):
        inside = _render(tag.contents.nodes) if tag.contents else ""
        return f"\n{inside}\n" if inside else " "
    return _render(tag.contents.nodes) if tag.contents else ""


def _render_template(template: Any) -> str:
    name = str(template.name).strip().lower().replace("_", " ")
    arguments = [p.value for p in template.params if not p.showkey or str(p.name).strip().isdigit()]
    if name in SYMBOLS:
        return SYMBOLS[name] + (_render(arguments[0].nodes) if name == "circa" and arguments else "")
    if name.startswith("formatnum:"):
        return name.removeprefix("formatnum:").strip()
    if name in ("convert", "cvt"):
        return _quantity([_render(argument.nodes).strip() for argument in arguments])
    if name == "as of":
        return "As of " + " ".join(_render(argument.nodes).strip() for argument in reversed(arguments))
    if name in JOINED:
        return "".join(_render(argument.nodes).strip() for argument in arguments)
    if name in NOT_TEXT:
        return HOLE
    if name in WORDS_OF and arguments:
        position = WORDS_OF[name]
        return _render(arguments[position if position < len(arguments) else -1].nodes)
    if name in ("hms", "uss") and arguments:
        return f"{name.upper()} {_render(arguments[0].nodes)}"
    if name.startswith("lang-") and arguments:
        return _render(arguments[0].nodes)
    return ""


def _quantity(arguments: list[str]) -> str:
    """{{convert|3|to|5|km|mi}} to "3 to 5 km": the numbers with the first unit."""
    words: list[str] = []
    for argument in arguments:
        if argument in RANGE_WORDS:
            words.append("by" if argument == "x" else argument.removesuffix("(-)"))
        elif argument[:1].isdigit() or argument[:1] in "-−+.":
            words.append(argument)
        else:
            return " ".join([*words, UNITS.get(argument, argument)])
    return " ".join(words)
