"""What a model is, found by passes over a few tokens: its decoder, its logits, what its attention leaves out.

Roles compute logits from hidden states, and adapters need layers that the model calls. Architectures differ in both,
and no config says how.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reward.errors import InputError

PROBE_TOKENS = 12
AMPLIFIED = 50.0  # a cap on logits shows where they are large, and those of a few tokens may be small


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part that gives the last hidden states: all but the head. A decoder is its own."""
    if model.base_model is not model:
        return model.base_model
    named: Any = model
    return named.model if model.get_output_embeddings() is not None and hasattr(model, "model") else model


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits from the decoder's last hidden states, of any leading shape."""
    projection = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    multipliers, divisors = (
        [getattr(config, key, None) or 1 for key in keys]
        for keys in (("logit_scale", "lm_head_multiplier"), ("logits_scaling", "logits_mup_width_multiplier"))
    )
    multiplier = math.prod(multipliers) / math.prod(divisors)
    caps = (
        getattr(config, key, None) for key in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    )
    softcap = next(filter(None, caps), None)
    logits = projection(hidden)  # type: ignore[operator]  # that there is one was checked
    if multiplier != 1:
        logits = logits * multiplier
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """A few tokens _1T of the model's vocabulary, on its device."""
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    return torch.arange(2, 2 + PROBE_TOKENS, device=model.device).remainder(vocabulary)[None]


def count_decoder_layers(model: PreTrainedModel) -> None:
    """Let the config count the decoder's layers: of a model with an encoder it counts the encoder's, by another name.

    transformers makes a cache of as many layers, and in a decoder with more of them (BlenderBot) that is too short.
    """
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "decoder_layers", None)
    if isinstance(layers, int) and config.num_hidden_layers != layers:
        config.num_hidden_layers = layers


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Compare what roles take for granted with the model's own logits on a few tokens.

    Raises `InputError` of kind `conflict` for a model that has no head, that attends to later tokens, or that does
    something else to its logits than `logits_of`.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise _refused(f"{name} has no language-model head")
    probe_BT = probe_tokens(model)
    # bf16 rounds to 0.4 %, and there the two ways of computing may differ in the order of roundings.
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    if getattr(model, "is_loaded_in_8bit", False):
        tolerance = 1e-1  # LLM.int8 chooses the columns that it rounds by all tokens of a pass
    own_BTV = probe_BT[..., None]
    for factor in (AMPLIFIED, 1.0):
        amplify = head.register_forward_hook(lambda _module, _inputs, logits, by=factor: logits * by)
        try:
            own_BTV = model(input_ids=probe_BT, use_cache=False).logits.float()
            hidden_BTH = decoder_of(model)(input_ids=probe_BT, use_cache=False).last_hidden_state
            found_BTV = logits_of(model, hidden_BTH).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises that is not of the usual form
            raise _refused(f"{name} is no causal language model of the usual form ({error})") from error
        finally:
            amplify.remove()
        if not _same(own_BTV, found_BTV, tolerance):
            raise _refused(f"{name} computes its logits in a way that is not supported")
    probe_BT[:, -1] = probe_BT[:, 0]
    if not _same(own_BTV[:, :-1], model(input_ids=probe_BT, use_cache=False).logits[:, :-1].float(), tolerance):
        raise _refused(f"{name} lets tokens attend to later ones")


def _same(expected: Tensor, found: Tensor, tolerance: float) -> bool:
    if expected.shape != found.shape:
        return False
    return bool(((expected - found).abs() <= tolerance * expected.abs().max()).all())


def _refused(what: str) -> InputError:
    return InputError(f"model: {what}", kind="conflict", key="model", fix="bring a causal language model")
