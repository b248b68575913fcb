"""Export of a role as an adapter of PEFT's for the original base.

A kind that PEFT has is written as PEFT has it. Others that have factors are a plain LoRA: the anchored one's
`[B−B0, B0]` and `[A; A−A0]` make one of rank 2r (r where B0 = 0) whose product is the whole change of the weight. PEFT
and vLLM load it as it is, in bf16 too, and the base needs no patch.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.kind import AdapterKind, PeftFiles
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors, WrappedLayer
from pe_rlhf.system.tensor_files import save_tensors

Layers = Mapping[str, AdapterLayer]
OWN_QUANTISED_LAYERS = ("LORA", "VERA")  # PEFT's types that have layers for quantised bases


def peft_forms(kind: AdapterKind[Any], layers: Layers) -> list[PeftFiles]:
    """What a role may be written as, the best first: PEFT's own form of its kind, a plain LoRA; it may be none."""
    own = kind.peft(layers)
    return [form for form in (own, plain_lora(layers)) if form is not None]


def plain_lora(layers: Layers, rank: int | None = None) -> PeftFiles | None:
    """A role as one LoRA, as `as_plain_lora`; None where its layers have no factors."""
    factors = {name: found for name, layer in layers.items() if (found := layer.lora_factors()) is not None}
    return as_plain_lora(factors, rank) if len(factors) == len(layers) else None


def as_plain_lora(factors: Mapping[str, LowRankFactors], rank: int | None = None) -> PeftFiles:
    """Factors by layer as one LoRA of the largest rank; `rank`: of at least that one."""
    from peft import LoraConfig  # PEFT takes seconds to import

    rank = max(rank or 0, *(f.A_RI.shape[-2] for f in factors.values()))
    scale = next(iter(factors.values())).scale
    tensors: dict[str, dict[str, Tensor]] = {}
    experts = [name for name, f in factors.items() if f.A_RI.dim() == 3]
    for name, f in factors.items():
        # PEFT takes one rank and one alpha for all layers: a smaller one is filled up with zeros.
        missing = rank - f.A_RI.shape[-2]
        A, B = nn.functional.pad(f.A_RI, (0, 0, 0, missing)), nn.functional.pad(f.B_OR, (0, missing))
        if name in experts:  # all experts' ranks along one axis: expert by expert in A, rank by rank in B
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        module, prefix = _place(name, experts)
        tensors.setdefault(module, {}).update({f"{prefix}lora_A.weight": A, f"{prefix}lora_B.weight": B})
    # PEFT divides alpha by r again; a fraction is fine with it.
    config = LoraConfig(r=rank, lora_alpha=scale * rank, fan_in_fan_out=False)  # type: ignore[arg-type]
    return PeftFiles(config, tensors, experts=experts)


def _place(name: str, experts: Sequence[str]) -> tuple[str, str]:
    """The module that PEFT wraps for a layer, and what the names of its factors in it begin with.

    For the parameters of one module it has a wrapper in the other; that of the first parameter is the innermost.
    """
    if name not in experts:
        return name, ""
    module = name.rpartition(".")[0]
    own = [other for other in experts if other.rpartition(".")[0] == module]
    return module, "base_layer." * (len(own) - 1 - own.index(name))


def factors_of_peft(
    written: Mapping[str, Tensor], names: Sequence[str], experts: Mapping[str, int]
) -> dict[str, Tensor]:
    """The factors of a LoRA of PEFT's under the names that ours has, `LAYER.lora_A` and `LAYER.lora_B`.

    experts: how many a fused weight has, for those among the names. Raises KeyError for a layer that PEFT has not.
    """
    found: dict[str, Tensor] = {}
    fused = [name for name in names if name in experts]
    for name in names:
        module, prefix = _place(name, fused)
        A, B = (written[f"base_model.model.{module}.{prefix}{part}.weight"] for part in ("lora_A", "lora_B"))
        if name in experts:
            A, B = A.unflatten(0, (experts[name], -1)), B.unflatten(1, (-1, experts[name])).permute(2, 0, 1)
        found |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    return found


def export_peft(
    files: PeftFiles, head: nn.Module | None, *, role: str, base_model: str, all_names: list[str], path: Path
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, and `head.safetensors` where the role has a head.

    A `reward` role is written for PEFT's sequence classification: its head is the `score` layer. That layer has no
    bias, so PEFT's logit is the role's score less the head's `bias`, which `head.safetensors` holds.

    Args:
        all_names: the names of all modules of the model, which PEFT looks for targets among.
        path: the directory to write.
    """
    from peft import TaskType

    tensors = {f"base_model.model.{n}.{part}": t for n, parts in files.tensors.items() for part, t in parts.items()}
    tensors |= {f"base_model.{name}": tensor for name, tensor in files.shared.items()}
    classifies = role.startswith("reward") and head is not None
    path.mkdir(parents=True, exist_ok=True)
    if head is not None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
        save_tensors(state, path / "head.safetensors")
        if classifies:
            tensors["base_model.model.score.weight"] = state["weight"][None, :]
    config: Any = copy.copy(files.config)
    config.base_model_name_or_path = base_model
    config.task_type = TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM
    config.modules_to_save = ["score"] if classifies else None
    config.inference_mode = True
    # Set afterwards: given to the constructor it becomes a set, and the file another one in every process.
    of_experts = {name.rpartition(".")[0] for name in files.experts}
    config.target_modules = _short_names(set(files.tensors) - of_experts, all_names)
    if files.experts:
        config.target_parameters = sorted(files.experts)
    config.save_pretrained(str(path))
    save_tensors({name: t.cpu().contiguous() for name, t in tensors.items()}, path / "adapter_model.safetensors")


def peft_refusal(files: PeftFiles, model: PreTrainedModel, *, all_names: list[str]) -> str | None:
    """Why PEFT would load other weights than were exported, or None where it loads these.

    It is tried on an empty model. PEFT takes the names of some mixtures' dense layers for those of their experts, and
    refuses layers of some state-space models; some of its types read the weight of a layer, and take no quantised one.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = type(model)(copy.deepcopy(model.config))
        for name in () if files.config.peft_type in OWN_QUANTISED_LAYERS else files.tensors:
            layer = model.get_submodule(name)
            assert isinstance(layer, WrappedLayer)
            if isinstance(layer.base, nn.Linear) and not layer.base.weight.is_floating_point():
                plain.set_submodule(name, _empty_packed(layer.base))
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_peft(files, None, role="policy", base_model="", all_names=all_names, path=Path(scratch))
        written = load_file(Path(scratch) / "adapter_model.safetensors")
        try:
            loaded = PeftModel.from_pretrained(plain, scratch, low_cpu_mem_usage=True)
            found = get_peft_model_state_dict(loaded)
            # Again, since only this says what it found no place for, and left at random: what it calls otherwise.
            unplaced = loaded.load_adapter(scratch, "default", low_cpu_mem_usage=True).unexpected_keys
        except Exception as error:  # whatever PEFT raises for what it does not take
            return f"PEFT does not load it: {shorten(str(error), 160, placeholder=' …')}"
    if unplaced:
        return f"PEFT would not load {unplaced[0].removeprefix('base_model.model.')}"
    if other := sorted(found.keys() ^ written.keys()):
        return f"PEFT would put it on other weights, such as {other[0].removeprefix('base_model.model.')}"
    other = next((name for name in written if found[name].shape != written[name].shape), None)
    return other and f"PEFT would give {other.removeprefix('base_model.model.')} another shape"


def _empty_packed(base: nn.Linear) -> nn.Linear:
    """A linear layer without memory whose weight has the dtype and shape of a quantised one."""
    layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    packed = torch.empty(base.weight.shape, dtype=base.weight.dtype, device="meta")
    layer.weight = nn.Parameter(packed, requires_grad=False)
    return layer


def _short_names(names: set[str], all_names: list[str]) -> list[str]:
    """The names' endings, as PEFT configs usually have them, where those match no other layer; else the whole names."""
    endings = {name.rsplit(".", 1)[-1] for name in names}
    matched = {name for name in all_names if name.rsplit(".", 1)[-1] in endings}
    return sorted(endings if matched == names else names)
