"""The modules of a model that get an adapter: PEFT's rules, for the names that recipes use."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pe_rlhf.adapters.experts import ExpertWeight, WrappedExperts, fused_parameters
from pe_rlhf.adapters.layer import WrappedLayer, is_wrappable
from pe_rlhf.system.progress import say
from reward.errors import InputError

# The names that model families give to the module that holds the attention projections.
ATTENTION_MODULES = frozenset({"attn", "attention", "self_attn", "self_attention", "linear_attn"})

# What experts are called where each has modules of its own.
UNFUSED = ("gate_proj", "up_proj", "w1", "w2", "w3")

Targets = str | list[str]

_WITHOUT_EFFECT: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
_SAID: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear map of the language model that it calls, by its name in the unwrapped model, except the head."""
    found = _adaptable(model).items()
    return {n: module for n, module in found if isinstance(module, nn.Module) and not isinstance(module, ExpertWeight)}


def expert_weights(model: PreTrainedModel) -> list[str]:
    """The names of the language model's fused expert weights that adapters can be put on."""
    linear = linear_modules(model)
    return [name for name in _adaptable(model) if name not in linear]


def numbers_of_experts(model: PreTrainedModel, names: Sequence[str]) -> dict[str, int]:
    """Of how many experts the fused weights among some targets are."""
    adaptable, fused = _adaptable(model), set(expert_weights(model))
    return {name: len(_weight_of(adaptable[name])) for name in names if name in fused}


def _adaptable(model: PreTrainedModel) -> dict[str, nn.Module | Tensor]:
    """What an adapter can be put on, in the model's order: linear modules, and fused weights of experts."""
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    idle = _WITHOUT_EFFECT.get(model, frozenset())
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    found: dict[str, nn.Module | Tensor] = {}
    for name, module in model.named_modules():
        if not name.startswith(prefix) or name.endswith(".base") or name in idle:
            continue
        if isinstance(module, WrappedLayer) or (module is not head and is_wrappable(module)):
            found[name] = module
        elif not isinstance(module, WrappedExperts):  # whose weights are modules of their own
            found |= {f"{name}.{part}": module.get_parameter(part) for part in fused_parameters(module)}
    return found


def plain_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a target by its name, in a model without adapters."""
    parent, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(parent), leaf)
    return found if isinstance(found, Tensor) else found.weight


def peft_adapts_experts(model: PreTrainedModel) -> bool:
    """Whether PEFT's `all-linear` has the experts of this model, as it says itself of a config for it."""
    from peft import LoraConfig  # PEFT takes seconds to import
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules="all-linear")
    convert_peft_config_for_transformers(config, model, conversions=None)
    return bool(config.target_parameters)


def note_layers_without_effect(model: PreTrainedModel, run: Callable[[], Tensor]) -> None:
    """Find the linear modules that an adapter would not change anything by, and leave them out from now on.

    Their weight is read and they are not called (Mamba's `dt_proj`, which PEFT cannot adapt either), what they give
    only chooses among tokens (DeepSeek-V3.2's indexer), or no block calls any of that name: they are for
    pictures, or for an encoder's states (BART). Of experts some are. `run` makes a pass and gives its logits.
    """
    outputs: dict[str, Tensor] = {}
    called: set[str] = set()
    read: set[str] = set()
    without: set[str] = set()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    before = [module._parameters for module in linear.values()]
    embeddings: nn.Module = model.get_input_embeddings()
    hooks = [
        embeddings.register_forward_hook(lambda _module, _inputs, states: states.detach().requires_grad_().clone())
    ]
    for name, module in linear.items():

        def note(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            called.add(name)
            if isinstance(output, Tensor):
                outputs[name] = output

        hooks.append(module.register_forward_hook(note))
        module.__dict__["_parameters"] = _Noting(module._parameters, lambda name=name: read.add(name))
    try:
        with torch.enable_grad():
            logits = run()
    finally:
        for hook in hooks:
            hook.remove()
        for module, parameters in zip(linear.values(), before, strict=True):
            module.__dict__["_parameters"] = parameters
    depending = {name: output for name, output in outputs.items() if output.requires_grad}
    if logits.requires_grad:
        with torch.enable_grad():
            total = logits.float().sum()
        found = torch.autograd.grad(total, list(depending.values()), allow_unused=True) if depending else ()
        without = {name for name, gradient in zip(depending, found, strict=True) if gradient is None}
        without |= outputs.keys() - depending.keys()
    ways = {re.sub(r"\.\d+\.", ".#.", name) for name in called | read}
    unused = {name for name in linear if re.sub(r"\.\d+\.", ".#.", name) not in ways}
    names = (read - called) | without | unused
    _WITHOUT_EFFECT[model] = frozenset(name.removesuffix(".base") for name in names)


class _Noting(dict[str, nn.Parameter | None]):
    """A module's parameters that say when one is read."""

    def __init__(self, parameters: dict[str, nn.Parameter | None], note: Callable[[], None]) -> None:
        super().__init__(parameters)
        self._note = note

    def __getitem__(self, name: str) -> nn.Parameter | None:
        self._note()
        return super().__getitem__(name)


def share_without_adapter(model: PreTrainedModel, names: Sequence[str]) -> tuple[float, list[str]]:
    """Which share of the language model's matrices these targets leave out, and how they are called.

    Embeddings and the head are left out. Experts that are fused into one parameter are the usual case.
    """
    decoder: nn.Module = model.get_decoder()
    adaptable = _adaptable(model)
    found = [_weight_of(adaptable[name]) for name in names]
    linear = {id(weight) for weight in found}
    tables = {id(m.weight) for m in decoder.modules() if isinstance(m, nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        tables.add(id(head.weight))
    matrices = {n: weight for n, weight in decoder.named_parameters() if weight.dim() > 1 and id(weight) not in tables}
    matrices = {n.replace(".base.", "."): weight for n, weight in matrices.items() if ".adapters." not in n}
    left = {name: weight.numel() for name, weight in matrices.items() if id(weight) not in linear}
    total = sum(weight.numel() for weight in matrices.values())
    large = (name.removesuffix(".weight") for name, size in left.items() if size > 0.001 * total)
    return sum(left.values()) / max(total, 1), sorted({".".join(name.split(".")[-2:]) for name in large})


def _weight_of(target: nn.Module | Tensor) -> Tensor:
    module = target.base if isinstance(target, WrappedLayer) else target
    return module if isinstance(module, Tensor) else module.weight  # type: ignore[return-value]


def module_names(model: PreTrainedModel) -> list[str]:
    """The names of all modules of the unwrapped model."""
    return [name for name, _ in model.named_modules() if not re.search(r"\.(base|adapters)(\.|$)", name)]


def shared_weights(model: PreTrainedModel) -> set[str]:
    """The linear modules whose weight is another one's too (Zamba's), which can have one adapter each all the same."""
    by_weight: dict[int, list[str]] = {}
    for name, module in linear_modules(model).items():
        base = module.base if isinstance(module, WrappedLayer) else module
        by_weight.setdefault(id(base.weight), []).append(name)
    return {name for names in by_weight.values() if len(names) > 1 for name in names}


def say_what_is_left_out(
    model: PreTrainedModel,
    names: Sequence[str],
    targets: Targets,
    last_layers: int | None = None,
    takes_experts: bool = False,
) -> None:
    """Say, once for a model, what gets no adapter although the word for the targets suggests it."""
    line = _what_is_left_out(model, list(names), targets, last_layers, takes_experts)
    if line is not None and line not in _SAID.setdefault(model, set()):
        _SAID[model].add(line)
        say(line)


def _what_is_left_out(
    model: PreTrainedModel, names: list[str], targets: Targets, last_layers: int | None, takes_experts: bool
) -> str | None:
    if targets == "all-linear":
        reached = _all_linear(model, takes_experts)
        share, left = share_without_adapter(model, reached)
        others = sorted({".".join(name.split(".")[-2:]) for name in expert_weights(model) if name not in reached})
        offer = f"; as in PEFT, {' and '.join(others)} get one where adapter.targets names them" if others else ""
        if share > 0.01:
            return f"adapter: {share:.0%} of the language model's weights get none: {', '.join(left)}" + (
                offer if takes_experts else ""
            )
    if targets == "attention":
        candidates = _in_last_layers(list(linear_modules(model)), last_layers)
        if bare := len(_blocks(candidates) - _blocks(names)):
            return f"adapter: in {bare} blocks no attention is known, and they get none"
    return None


def _all_linear(model: PreTrainedModel, takes_experts: bool) -> list[str]:
    """What the word means: all linear modules, and the experts where they are in PEFT's."""
    has_experts = takes_experts and expert_weights(model) and peft_adapts_experts(model)
    return list(_adaptable(model) if has_experts else linear_modules(model))


def find_targets(
    model: PreTrainedModel,
    targets: Targets,
    last_layers: int | None = None,
    exclude: Targets | None = None,
    takes_experts: bool = False,
) -> list[str]:
    """Names for `all-linear`, `attention`, a regular expression, or a list of names or name endings.

    Expressions and endings are as PEFT's `target_modules`, and as its `target_parameters` for fused weights of experts,
    where the kind `takes_experts`. `last_layers` keeps only those of the last blocks: backward passes then end there.
    `exclude` takes an expression or a list too.

    Raises `InputError` where a listed name or an expression matches nothing, and where nothing is left.
    """
    names = _in_last_layers(list(_adaptable(model) if takes_experts else linear_modules(model)), last_layers)
    if targets == "all-linear":
        reached = set(_all_linear(model, takes_experts))
        chosen = [name for name in names if name in reached]
    elif targets == "attention":
        # By the parent's name, since GPT-2 calls the output projections of attention and MLP both `c_proj`.
        chosen = [name for name in names if name.split(".")[-2:][0] in ATTENTION_MODULES]
        if not chosen:
            raise _unmatched("no attention layers are known for this model", names, "conflict")
    else:
        chosen = _matching(model, names, targets, "adapter.targets")
    if exclude:
        left_out = set(_matching(model, names, exclude, "adapter.exclude"))
        chosen = [name for name in chosen if name not in left_out]
    if not chosen:
        raise InputError("adapter.exclude: no layer is left", kind="empty", key="adapter.exclude")
    return chosen


def _matching(model: PreTrainedModel, names: list[str], wanted: Targets, key: str) -> list[str]:
    """The names that match an expression, or that are or end in one of those listed; in the model's order."""
    if isinstance(wanted, str):
        try:
            if found := [name for name in names if re.fullmatch(wanted, name)]:
                return found
        except re.error as error:
            raise InputError(f"{key}: {wanted!r} is no regular expression: {error}", kind="invalid", key=key) from error
    listed = [wanted] if isinstance(wanted, str) else wanted
    for target in listed:
        if not any(_matches(name, target) for name in names):
            raise _unmatched(f"no layer of this model is called {target!r}{_reason(model, target)}", names, key=key)
    return [name for name in names if any(_matches(name, target) for target in listed)]


def _reason(model: PreTrainedModel, target: str) -> str:
    """Why a name that the model has is no target."""
    if any(_matches(name, target) for name in _WITHOUT_EFFECT.get(model, ())):
        why = "the model reads its weight itself, only chooses by it, or has no use for it in a text"
        return f", where an adapter would have an effect: {why}"
    fused = {name.rsplit(".", 1)[-1] for name, weight in model.get_decoder().named_parameters() if weight.dim() == 3}
    if fused and (any(target in name for name in fused) or target in UNFUSED):
        adaptable = {name.rsplit(".", 1)[-1] for name in expert_weights(model)}
        return f"; its experts are fused into {', '.join(sorted(fused))}, which " + (
            "a LoRA can be put on by these names, with an init that looks at no data"
            if adaptable
            else "adapters cannot be put on"
        )
    if any(_matches(name, target) for name, _ in model.named_modules()):
        return ", among the linear ones of its language model that take and give one tensor"
    return ""


def _unmatched(
    what: str, names: list[str], kind: Literal["unknown", "conflict"] = "unknown", key: str = "adapter.targets"
) -> InputError:
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    return InputError(f"{key}: {what}", kind=kind, key=key, fix=f"name some of {', '.join(endings)}")


def _blocks(names: list[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}


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
