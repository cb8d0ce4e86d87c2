"""The README.md of an exported directory: what it is, how to load it, how to put the prefix in front."""

import json
from collections.abc import Mapping
from typing import Any

from intactkv.prefix import Prefix

__all__ = ["how_to"]

NEEDS = {
    "compressed-tensors": "`transformers` and `compressed-tensors`",
    "gptq": "`transformers`, `gptqmodel` and `optimum`",
    "gptq-v2": "`transformers`, `gptqmodel` and `optimum`; other readers of GPTQ's format expect its version 1",
    "awq": "`transformers` and `gptqmodel`",
    "dense": "`transformers` alone: these are plain weights that lie on the quantizer's levels, as large as ever",
}
UNPACKS = """
The configuration asks transformers to unpack while loading, which it needs for zero points, and for scales that are
wider than the model's dtype. The same in your own words, with `CompressedTensorsConfig` from `transformers`:
`from_pretrained(…, quantization_config=CompressedTensorsConfig(dequantize=True))`.
"""
NO_PREFIX = """
## Prefix

None lies beside. IntactKV's `attach` takes any that was made for this checkpoint, and refuses those of another model or
basis.
"""
PREFIX = """
## Prefix

`{file}` holds the keys and values of {count} leading tokens {ids}, as the full-precision model wrote them
(IntactKV, arXiv 2403.01241). With the project's package on the path:

```python
from intactkv.attach import attach
from intactkv.prefix import Prefix

intact = attach(model, Prefix.load("{directory}/{file}"))
intact.generate(input_ids, max_new_tokens=64, prepend=True)   # input_ids without the prefix's tokens
```
{needed}
vLLM and other servers cannot take the prefix today: they compute these tokens with the quantized model, which is what
the prefix avoids. Used there, this checkpoint is an ordinary quantized one.
"""
NEEDED = """
**These weights were calibrated behind that prefix. Without it they are worse than ordinary ones; always attach it.**
"""


def how_to(
    directory: str,
    format_name: str,
    manifest: Mapping[str, Any],
    facts: str,
    unpacks: bool,
    prefix: Prefix | None,
    prefix_file: str,
) -> str:
    """The text. facts: a sentence on grids and scales. unpacks: whether the configuration asks for that."""
    made = json.dumps({"identity": manifest["identity"], **manifest["made_of"]}, indent=2, ensure_ascii=False)
    text = f"""# {manifest["source"]["name"]}, {manifest["label"]}

{manifest["source"]["name"]} quantized by IntactKV's `python -m quantization` and exported as {format_name}.
{facts} How good it is was not measured for this file.

## Load

Needs {NEEDS[format_name]}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{directory}")
tokenizer = AutoTokenizer.from_pretrained("{directory}")
```
"""
    if unpacks:
        text += UNPACKS
    if prefix is None:
        text += NO_PREFIX
    else:
        needed = NEEDED if manifest["needs_prefix"] is not None else ""
        text += PREFIX.format(
            file=prefix_file, count=len(prefix), ids=prefix.ids.tolist(), directory=directory, needed=needed
        )
    return text + f"\n## Made by\n\n```json\n{made}\n```\n"
