"""The text that comes by package: Wikipedia articles from a wheel's test data, cleaned and split by article.

The dump (April 2016, articles from the letter A) lies in the wheel of gensim 4.4.0; its text is under CC BY-SA 3.0 and
the GFDL. Its pages become prose (`wikitext_markup`) and go, whole articles at a time, to one of two roles that share no
article: calibration and evaluation. The result has a known SHA-256, so everybody's "sample" is the same text.
"""

import bz2
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from corpora.errors import UserError
from corpora.fetch import prepare_directory, wheel_member
from corpora.files import sha256_of_file
from corpora.wikitext_markup import plain_text

__all__ = ["ROLES", "prepare_sample", "split_articles"]

REQUIREMENT = "gensim==4.4.0"
MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
MEMBER_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
# The wheel exists for some platforms only; its data is the same in all, so one is asked for by name.
ANY_PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp")
ROLES = ("calibration", "evaluation")
OUTPUT_SHA256 = {
    "calibration.jsonl": "1b5212ec6726d8abb4a691952d83afad83112889ec6f2f703fa9e985d1256d6d",
    "evaluation.jsonl": "d57622f52f7244becf37d67a390042c18f1438cf50e0a3e24a7315338e9e9a5e",
}
SHORTEST_ARTICLE = 1500  # characters of prose; below it are disambiguation pages and stubs


def prepare_sample(target: Path) -> bool:
    """Make calibration.jsonl and evaluation.jsonl in `target` unless there and whole. Returns whether it had to."""
    return prepare_directory(
        target,
        _build,
        lambda note: {name: note.get("files", {}).get(name) for name in OUTPUT_SHA256} == OUTPUT_SHA256,
    )


def _build(directory: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        dump = wheel_member(REQUIREMENT, MEMBER, MEMBER_SHA256, Path(folder), options=ANY_PLATFORM)
        roles = split_articles(_articles(dump))
    for role, articles in roles.items():
        lines = (json.dumps({"title": title, "text": text}, ensure_ascii=False) for title, text in articles)
        (directory / f"{role}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for name, expected in OUTPUT_SHA256.items():
        found = sha256_of_file(directory / name)
        if found != expected:
            raise UserError(
                f"the prepared {name} has SHA-256 {found}, expected {expected}: another release of mwparserfromhell "
                "reads the markup differently; install the one in requirements.txt (bash scripts/setup.sh)"
            )
    return {
        "name": "sample: articles of the English Wikipedia, April 2016, as plain prose",
        "source": f"{REQUIREMENT} (PyPI), {MEMBER}",
        "source_sha256": MEMBER_SHA256,
        "licence": "CC BY-SA 3.0 and GFDL; authors: the contributors of the articles at en.wikipedia.org, by title",
        "documents": {role: len(articles) for role, articles in roles.items()},
        "characters": {role: sum(len(text) for _, text in articles) for role, articles in roles.items()},
    }


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and prose of every article of the dump that is long enough, in the dump's order."""
    from tqdm import tqdm

    with bz2.open(dump) as file:
        pages = ElementTree.parse(file).getroot().findall("{*}page")
    for page in tqdm(pages, desc="sample", unit="page"):
        if page.find("{*}redirect") is None:
            title = page.findtext("{*}title", "")
            text = plain_text(title, page.findtext("{*}revision/{*}text", ""))
            if len(text) >= SHORTEST_ARTICLE:
                yield title, text


def split_articles(articles: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Deal whole articles, longest first, to the role that has fewer characters; each role keeps the given order."""
    articles = list(articles)
    taken: dict[str, set[int]] = {role: set() for role in ROLES}
    size = dict.fromkeys(ROLES, 0)
    for index in sorted(range(len(articles)), key=lambda i: (-len(articles[i][1]), articles[i][0])):
        role = min(ROLES, key=lambda name: size[name])  # the first one when equal
        taken[role].add(index)
        size[role] += len(articles[index][1])
    return {role: [articles[index] for index in sorted(taken[role])] for role in ROLES}
