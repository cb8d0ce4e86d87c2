"""Open an exported checkpoint with transformers alone and write down its logits. Run by `verify.py`.

    python -P reader.py PACKAGES DIRECTORY TOKENS.safetensors LOGITS.safetensors

A script for any interpreter that has the packages (names with commas between them): it imports nothing of this project.
(-P, because the modules beside it are called like the libraries whose formats they write.) Exits with 3 and the names
of missing packages; without a directory that is all it does.
"""

import importlib.metadata
import json
import sys


def version(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Load, compute in float32 on the CPU, write logits (B, T, vocabulary) with the packages' versions."""
    packages, *files = sys.argv[1:]
    versions = {package: version(package) for package in packages.split(",")}
    missing = [package for package, found in versions.items() if found is None]
    if missing:
        print(" ".join(missing))
        sys.exit(3)
    if not files:
        return
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    directory, tokens, out = files
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map="cpu", trust_remote_code=False
    ).eval()
    with torch.no_grad():
        logits = model(input_ids=load_file(tokens)["ids"], use_cache=False).logits.float().contiguous()
    kinds = sorted({type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__})
    save_file({"logits": logits}, out, {"reader": json.dumps({"versions": versions, "linears": kinds})})


if __name__ == "__main__":
    main()
