"""The modules of a model that get an adapter: PEFT's rules, for the names that recipes use."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.layer import WrappedLayer, is_wrappable
from reward.errors import InputError

# The names that model families give to the module that holds the attention projections.
ATTENTION_MODULES = frozenset({"attn", "attention", "self_attn", "self_attention"})

Targets = str | list[str]


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear map of the model by its name in the unwrapped model, except the language-model head."""
    head = model.get_output_embeddings()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, WrappedLayer) or (is_wrappable(module) and module is not head):
            if name.endswith(".base"):
                continue
            found[name] = module
    return found


def find_targets(model: PreTrainedModel, targets: Targets, last_layers: int | None = None) -> list[str]:
    """Module names for `all-linear`, `attention`, or a list of names or name endings (PEFT's suffix rule).

    `last_layers` keeps only those of the last blocks: backward passes then end there. Raises `InputError` where a
    listed name matches nothing.
    """
    names = _in_last_layers(list(linear_modules(model)), last_layers)
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    if targets == "all-linear":
        return names
    if targets == "attention":
        # By the parent's name, since GPT-2 calls the output projections of attention and MLP both `c_proj`.
        chosen = [name for name in names if name.split(".")[-2:][0] in ATTENTION_MODULES]
        if not chosen:
            raise InputError(
                "adapter.targets: no attention layers are known for this model",
                kind="conflict",
                key="adapter.targets",
                fix=f"name some of {', '.join(endings)}",
            )
        return chosen
    wanted = [targets] if isinstance(targets, str) else targets
    for target in wanted:
        if not any(_matches(name, target) for name in names):
            raise InputError(
                f"adapter.targets: no layer of this model is called {target!r}",
                kind="unknown",
                key="adapter.targets",
                fix=f"name some of {', '.join(endings)}",
            )
    return [name for name in names if any(_matches(name, target) for target in wanted)]


def _in_last_layers(names: list[str], count: int | None) -> list[str]:
    """The names whose block number, the first number in a name, is among the `count` highest."""
    if count is None:
        return names
    blocks = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
    if count > (total := len(set(blocks.values()))):
        raise InputError(
            f"adapter.last_layers: {count} is more than the {total} blocks of this model",
            kind="conflict",
            key="adapter.last_layers",
        )
    return [name for name, block in blocks.items() if block > max(blocks.values()) - count]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
