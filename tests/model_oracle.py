"""What a role of a model should compute: the oracle of `tests/model_matrix.py`.

It is a plain model with ΔW = s·(BA − B0A0) added to its weights by hand, run on each row without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pe_rlhf.adapters.lora.anchored import scale_of
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.probes import decoder_of
from pe_rlhf.types import Sequences
from tests.model_types import MODELS, build
from tests.tiny import rows_of


def plain(name: str) -> PreTrainedModel:
    """Transformers' own model; a cap on attention needs eager, and a cache needs the decoder's number of layers."""
    model = build(name)
    if "decoder_layers" in MODELS[name]:
        model.config.encoder_layers = model.config.decoder_layers
    if "attn_logit_softcapping" in MODELS[name]:
        model.set_attn_implementation("eager")
    return model


def with_delta(backbone: Backbone, name: str, role: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The plain model with a role's ΔW in its weights, and the weights that have one, by module name."""
    model, state = plain(name), backbone.role_state(role)
    spec = backbone.adapter_spec(role)
    weights = {}
    model.requires_grad_(False)
    for module_name in spec.modules:
        module, leaf = place(model, module_name)
        weight, delta_OI = getattr(module, leaf), change(state, module_name, spec)
        # A new one: Zamba's blocks share theirs, and each has a ΔW of its own.
        setattr(module, leaf, torch.nn.Parameter(weight + (delta_OI.mT if is_in_out(module) else delta_OI)))
        weights[module_name] = getattr(module, leaf)
    return model, weights


def place(model: PreTrainedModel, name: str) -> tuple[torch.nn.Module, str]:
    """The module that has a target's weight, and what the weight is called in it; fused experts have several."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    return (owner, leaf) if leaf in owner._parameters else (model.get_submodule(name), "weight")


def is_in_out(module: torch.nn.Module) -> bool:
    return isinstance(module, Conv1D) or getattr(module, "is_transposed", False)


def change(state: dict[str, Tensor], name: str, spec: AdapterSpec) -> Tensor:
    product = state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
    if f"{name}.initial_A_RI" in state:
        product = product - state[f"{name}.initial_B_OR"] @ state[f"{name}.initial_A_RI"]
    return scale_of(spec.settings) * product  # type: ignore[arg-type]


def oracle(backbone: Backbone, name: str, role: str, sequences: Sequences) -> dict[str, Tensor]:
    """What a role should compute, and the gradients of A and B of the sum of it: s·BᵀG and s·GAᵀ."""
    model, weights = with_delta(backbone, name, role)
    for weight in weights.values():
        weight.requires_grad_()
    result = row_by_row(model, decoder_of(model), backbone, role, sequences)
    state, scale = backbone.role_state(role), scale_of(backbone.adapter_spec(role).settings)  # type: ignore[arg-type]
    for module_name, weight in weights.items():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        G_OI = gradient.mT if is_in_out(place(model, module_name)[0]) else gradient
        result[f"{module_name}.lora_A"] = scale * state[f"{module_name}.lora_B"].mT @ G_OI
        result[f"{module_name}.lora_B"] = scale * G_OI @ state[f"{module_name}.lora_A"].mT
    return result


def row_by_row(
    model: torch.nn.Module, decoder: torch.nn.Module, backbone: Backbone, role: str, sequences: Sequences
) -> dict[str, Tensor]:
    """What a plain model says of each row, with a role's head; the gradients of its weights are left in them."""
    found, entropies = [], []
    for prompt, response in rows_of(sequences):
        ids_1T = torch.tensor([prompt + response])
        if role == "policy":
            logprobs_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float().log_softmax(-1)[len(prompt) - 1 :]
            found.append(logprobs_TV[torch.arange(len(response)), torch.tensor(response)])
            entropies.append(-(logprobs_TV.exp() * logprobs_TV).sum(-1)[: len(response)].detach())
            continue
        hidden_TH = decoder(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
        head = backbone.head(role)
        numbers_T = hidden_TH @ head.weight.detach() + head.bias.detach()
        found.append(numbers_T[len(prompt) - 1 : -1] if role == "value" else numbers_T[-1:])
    numbers_N = torch.cat(found)
    numbers_N.sum().backward()
    return {"numbers": numbers_N.detach()} | ({"entropies": torch.cat(entropies)} if entropies else {})
