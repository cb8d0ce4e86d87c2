"""What fits a KV policy, settled before any work: the model's heads, the run's prefix, an artefact that is given."""

import logging

from transformers import PreTrainedConfig

from corpora.errors import UserError
from corpora.storage import identity
from intactkv.architecture import architecture_of
from intactkv.cache import IntactCache
from intactkv.policy import Bound
from intactkv.prefix import check_owner
from quantization.runs.fitting import model_of
from quantization.runs.known import Known
from quantization.runs.kv_artefact import AGAIN as MAKE_KV

__all__ = ["check_kv"]

log = logging.getLogger(__name__)


def check_kv(plan: Known, config: PreTrainedConfig, makes: str) -> None:
    """Raise UserError for a KV policy that the model cannot have, and for a given artefact of it that is not the run's;
    before any work. config: of the model; makes: as `plan_run` takes it."""
    recipe, given, kv, checkpoint = plan.recipe, plan.given_kv, plan.recipe.kv_cache, plan.checkpoint
    if recipe.calibrate_behind_prefix and not (plan.makes_weights_of_text or plan.makes_kv):
        raise UserError(
            "calibrate_behind_prefix=true has nothing to act on: what the KV cache is calibrated to is there already; "
            "leave it out"
        )
    if makes == "kv" and not plan.makes_kv:
        if kv is None or not kv.calibrates:
            what = "a KV cache in full precision" if kv is None else type(kv).__name__
            raise UserError(
                f"{what} calibrates on no text, so there is nothing to make; name a policy that does, for example --kv "
                "static --kv-bits 4"
            )
        raise UserError(
            f"{type(kv).__name__} is calibrated with the weights of {checkpoint.name}, whose checkpoint keeps what it "
            "found; there is nothing to make"
        )
    if makes == "kv" and plan.has_prefix and not recipe.calibrate_behind_prefix:
        raise UserError(
            f"--prefix {recipe.prefix} has nothing to act on: the calibration text does not run behind it; add "
            "--calibrate-behind-prefix, or leave it out"
        )
    if kv is None:
        return
    IntactCache(config, policy=Bound(kv, {} if given is None else given.tensors, plan.packed_kv))
    if plan.makes_kv:
        architecture_of(config)
        if plan.vanilla and recipe.calibrate_behind_prefix:
            raise UserError(
                "the KV cache is calibrated behind the intact prefix, and only fits behind it; leave --vanilla or "
                "--calibrate-behind-prefix out"
            )
    if given is None:
        return
    if checkpoint.manifest is None and recipe.trains_kv:
        raise UserError(f"the weights of {recipe.label()} are trained with a KV cache of their own; leave {given} out")
    if kv != given.policy:
        raise UserError(
            f"the KV artefact {given} is for {given.policy}, not for {kv}; leave the options of the KV cache out"
        )
    check_owner(
        given.owner, model_of(checkpoint.directory, (checkpoint.fingerprint, plan.basis)), "KV artefact", MAKE_KV
    )
    if plan.named is not None or plan.vanilla:
        given.check_front(() if plan.vanilla or plan.named is None else plan.named.ids)
    calibrated, running = identity(given.made_of["weights"]), identity(plan.weights_made_of)
    if calibrated != running:
        log.warning(
            "the KV artefact %s was calibrated on the weights %s (%s); those that run now are %s (%s)",
            given,
            given.weights,
            calibrated,
            plan.weights_label,
            running,
        )
