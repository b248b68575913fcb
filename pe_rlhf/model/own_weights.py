"""Plain copies of a model, to be trained whole."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.layer import unwrap
from pe_rlhf.model.probes import decoder_of
from pe_rlhf.system.distributed import is_sharded
from reward.errors import InputError


def plain_copy(model: PreTrainedModel, source: str, own: PreTrainedModel | None, *, whole: bool) -> nn.Module:
    """A model without adapters that computes what a role does, all of it trainable; its decoder unless `whole`.

    Args:
        source: the role.
        own: the weights of its own that the role has, if any.

    Raises `InputError` for a base that is quantised or split by ZeRO-3.
    """
    if is_sharded(model):
        message = "tuning: full: the base has to be whole on each process: not with zero3"
        raise InputError(message, kind="conflict", key="tuning")
    copied = copy.deepcopy(model if own is None else own)
    if own is None:
        unwrap(copied, source)
        if not all(parameter.is_floating_point() for parameter in copied.parameters()):
            raise InputError("tuning: full: a quantised base cannot be trained", kind="conflict", key="tuning")
        copied.requires_grad_(True)
    return copied if whole else decoder_of(copied)
