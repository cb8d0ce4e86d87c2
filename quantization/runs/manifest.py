"""The manifest of a quantized checkpoint: what made it, at one boundary.

`PARTS` names the classes that manifests and other artefacts keep parts of recipes under.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.json_files import Count, FileName, Hash, fitted, identity, read_json
from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import KV_POLICIES
from quantization.model.attention import AttentionProducts
from quantization.recipes.protocols import restored
from quantization.runs.configuration import CONFIG
from quantization.runs.sums import checked, known_sums
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth

__all__ = ["FORMAT", "MANIFEST", "PARTS", "is_quantized", "read_manifest"]

FORMAT = 2
MANIFEST = "quantization.json"

# The classes that a loaded checkpoint needs of its recipe, by the names under which manifests keep them: transforms,
# quantizers of attention's inputs, KV policies. A new one adds a row.
PARTS: Mapping[str, type] = {
    kind.__name__: kind for kind in (UniformGrid, AttentionProducts, Rotate, Smooth, *KV_POLICIES.values())
}


def is_quantized(directory: Path) -> bool:
    """Whether a directory is a quantized checkpoint of this project."""
    return (directory / MANIFEST).is_file()


class _Part(TypedDict):
    kind: str


class _Recipe(TypedDict):
    transforms: list[_Part]
    weights: _Part | None
    prefix: str
    attention: NotRequired[_Part | None]
    kv_cache: NotRequired[_Part | None]


class _Source(TypedDict):
    name: FileName
    directory: str
    fingerprint: Hash


class _Manifest(TypedDict):
    format: int
    identity: Hash
    label: FileName
    made_of: dict[str, Any]
    recipe: _Recipe
    basis: str
    source: _Source
    needs_prefix: list[Count] | None
    needs_kv: NotRequired[Hash | None]


def read_manifest(directory: Path) -> dict[str, Any]:
    """What made a quantized checkpoint; what it says of its recipe can be `restored`.

    Raises UserError if it is missing, damaged or of another version, or if it or the configuration beside it changed
    since the checkpoint was finished.
    """
    file = directory / MANIFEST
    again = "delete the directory and quantize again"
    manifest: dict[str, Any] = read_json(file, "quantization manifest", dict, mend=again)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{file} is not a whole manifest of format {FORMAT} (its format: {manifest.get('format')}); {again}"
        )
    fitted(manifest, _Manifest, f"quantization manifest {file}", mend=again)
    made_of, recipe = manifest["made_of"], manifest["recipe"]
    said = {name: recipe[name] for name in ("transforms", "weights", "attention", "kv_cache") if name in recipe}
    agrees = identity(made_of) == manifest["identity"] and made_of.get("source") == manifest["source"]["fingerprint"]
    if not agrees or any(made_of.get(name, part) != part for name, part in said.items()):
        raise UserError(f"{file} is damaged: it says other things than its identity was made of; {again}")
    for part in (*recipe["transforms"], recipe.get("attention"), recipe.get("kv_cache")):
        if part is not None and (part["kind"] in PARTS or part not in recipe["transforms"]):
            restored(part, PARTS, str(file))
    for name in known_sums(directory).keys() & {MANIFEST, CONFIG}:
        checked(directory / name)
    return manifest
