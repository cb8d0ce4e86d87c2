"""What named recipes need, for a plan that must not load torch: the text they calibrate on, and the size of groups.

The recipes themselves say it in `quantization.named`; a test holds these lists to them.
"""

__all__ = ["group_of", "text_of"]


def _names(family: str, *ends: str) -> dict[str, None]:
    return dict.fromkeys(f"{family}-{end}" if end else family for end in ends)


_ENDS = [f"w4a{bits}kv4-{scale}{ft}" for bits in (4, 8) for scale in ("static", "dynamic") for ft in ("", "-ft")]
_TEXTS = {
    "c4": _names("gptq", "", "w4", "w3", "w2", "autogptq", "row", "bcq") | _names("spqr", "", "w4", "w2", "authors")
    | _names("zeroquant", "w8a8-lkd", "w4-8a16-lkd", "w4-8a8-lkd", "w4a4-lkd"),
    "pile": _names("awq", "", "w4", "w3") | _names("smooth", "") | _names("prefixquant", *_ENDS)
    | _names("smoothquant", *(f"w{n}a{n}{end}" for n in (8, 6, 4) for end in ("", "-qllm"))),
    "wikitext2": _names("omniquant", "", "w4", "w3", "w2", "let", "w4a4", "w6a6") | _names("quarot", "", "w4")
    | _names("gptq", "w4a4kv4"),
}  # fmt: skip
_GROUPS = {
    128: _names("rtn", "", "w4", "w3", "w2") | _names("gptq", "", "w4", "w3", "w2", "autogptq", "bcq")
    | _names("awq", "", "w4", "w3") | _names("bcq", "", "w3") | _names("omniquant", "", "w4", "w3", "w2"),
    16: _names("spqr", "", "w4", "authors"),
    32: _names("spqr", "w2"),
}  # fmt: skip


def text_of(recipe: str) -> str:
    """The corpus that a named recipe calibrates on; empty for one that looks at no text."""
    return next((text for text, names in _TEXTS.items() if recipe in names), "")


def group_of(recipe: str) -> int:
    """Input channels that share a scale; -1 where a row is one group, or nothing of the weights is rounded."""
    return next((size for size, names in _GROUPS.items() if recipe in names), -1)
