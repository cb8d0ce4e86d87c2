"""IntactKV: keep the keys and values of the pivot tokens exactly as the full-precision model wrote them.

    from intactkv.attach import attach
    from intactkv.prefix import build_prefix

    prefix = build_prefix(full_precision_model, [bos_token_id])     # once; prefix.save(path) keeps it
    model = attach(quantized_model, prefix)                         # any AutoModelForCausalLM
    model.generate(input_ids, max_new_tokens=64)

Nothing is imported here, so that `python -m intactkv --help` does not wait for torch.
"""
