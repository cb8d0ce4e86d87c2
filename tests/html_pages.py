"""A page as elements, read strictly, and what it would fetch."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "rect", "line", "source", "col", "wbr", "area", "base", "embed"}
LOADING = ("src", "href", "srcset", "poster", "data", "action", "formaction", "xlink:href", "background", "manifest")


class Element:
    """An element of a page. text: all that stands in it, in order."""

    def __init__(self, name: str, attributes: dict[str, str], parent: "Element | None"):
        self.name, self.attributes, self.parent = name, attributes, parent
        self.children: list[Element] = []
        self.text = ""

    def all(self, *names: str) -> Iterator["Element"]:
        """Elements below of some names, or all."""
        for child in self.children:
            if not names or child.name in names:
                yield child
            yield from child.all(*names)


class Tree(HTMLParser):
    """A page as elements; fails for an end tag that closes another element than the open one."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.top = self.at = Element("", {}, None)
        self.feed(text)
        self.close()
        assert self.at is self.top, f"<{self.at.name}> is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice: {attrs}"
        element = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.children.append(Element(tag, {name: value or "" for name, value in attrs}, self.at))

    def handle_endtag(self, tag: str) -> None:
        assert self.at.name == tag, f"</{tag}> closes <{self.at.name}>"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        at: Element | None = self.at
        while at is not None:
            at.text += data
            at = at.parent


def loads(text: str) -> list[str]:
    """What a page would fetch: addresses in attributes and in styles that are neither within it nor data."""
    tree = Tree(text).top
    found = [e.attributes[name] for e in tree.all() for name in LOADING if name in e.attributes]
    found += re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", " ".join(e.text for e in tree.all("style")))
    return [str(one) for one in found if not str(one).startswith(("#", "data:image/"))]
