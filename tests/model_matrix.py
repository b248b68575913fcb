"""What works with a model, found by comparing each thing that a role computes with plain transformers.

The oracle is in `tests/model_oracle.py`.
`python -m tests.model_matrix > docs/models.md` writes the page.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers.utils import logging as transformers_logging

from pe_rlhf.adapters.targets import expert_weights, peft_adapts_experts, share_without_adapter, shared_weights
from pe_rlhf.config import SamplingConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.probes import decoder_of
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.rollout.reading import Reading
from pe_rlhf.runs.export import merged_state
from pe_rlhf.system.progress import console
from pe_rlhf.types import Sequences
from reward.errors import InputError
from tests.failures import raises
from tests.model_oracle import oracle, plain, row_by_row, with_delta
from tests.model_types import MODELS, build
from tests.tiny import perturb, randomise_head, set_fast

START = [2, 0, 4, 5]
PROMPTS = [[*START, 6, 7], [*START, 8], [*START, 6, 7], [*START, 9, 10, 1, 12]]
RESPONSES = [[20, 21, 0, 1], [22, 23, 24, 25, 26], [27], [28, 29]]
TOLERANCE = 2e-4  # of the greatest number; state-space models add up in another order with a cache


@dataclass(frozen=True)
class Outcome:
    """What a model can do; `refused` is the sentence where it can do nothing.

    Attributes:
        packed: whether batches are packed.
        trunk: whether a frozen trunk is computed once.
        reading: what sampling reads together.
        peft: "" where PEFT loads the export as what it is, else why there is none.
        experts: how fused experts get an adapter: by the word `all-linear`, by name, or "" where there are none.
        bare: the share of the weights that can have no adapter, and how they are called, where that is over 1 %.
    """

    refused: str = ""
    packed: bool = False
    trunk: bool = False
    reading: Reading = Reading.EQUAL_ONCE
    peft: str = ""
    experts: str = ""
    bare: str = ""


def check(name: str) -> Outcome:
    """Try everything with one model. AssertionError says what is wrong, `Outcome` what there is."""
    try:
        backbone = load_backbone(build(name))
        add_roles(backbone)
    except InputError as error:
        return Outcome(refused=str(error))
    sequences = Sequences.pack(PROMPTS, RESPONSES, pad_id=0)
    check_step_0(backbone, name, sequences)
    for role in ("policy", "value", "reward"):
        perturb(backbone, role, 0.1)
    for role in ("value", "reward"):
        randomise_head(backbone, role)
    expected = {role: oracle(backbone, name, role, sequences) for role in ("policy", "value", "reward")}
    compare_every_way(backbone, sequences, expected)
    reading = check_sampling(backbone, name)
    check_merged(backbone, name, sequences)
    peft = check_peft(backbone, name, sequences)
    trunk = check_trunk(name, sequences)
    check_own_weights(name, sequences)
    return Outcome("", backbone.can_pack, trunk, reading, peft, *without_adapter(backbone))


def compare_every_way(backbone: Backbone, sequences: Sequences, expected: dict[str, dict[str, Tensor]]) -> None:
    """What roles compute packed and padded, each with and without computing blocks again in the backward pass."""
    for packing in (True, False) if backbone.can_pack else (False,):
        for again in (False, True):
            set_fast(backbone, packing=packing, gradient_checkpointing=again)
            for role, wanted in expected.items():
                compare(f"{role}, packed {packing}, again {again}", numbers(backbone, role, sequences), wanted)
    set_fast(backbone, packing=True, gradient_checkpointing=False)


def without_adapter(backbone: Backbone) -> tuple[str, str]:
    """`Outcome.experts` and `Outcome.bare`."""
    model = backbone.model
    experts = "" if not expert_weights(model) else "all-linear" if peft_adapts_experts(model) else "by name"
    share, names = share_without_adapter(model, backbone.adapter_spec("policy").modules)
    return experts, f"{share:.0%}: {', '.join(names)}" if share > 0.01 else ""


def add_roles(backbone: Backbone, last_layers: int | None = None) -> None:
    """Adapters on all that can have one, experts included, whether or not `all-linear` has them."""
    for role, init in {"policy": "pissa", "value": "lora", "reward": "milora"}.items():
        backbone.add_adapter(role, init=init, rank=1, alpha=2, last_layers=last_layers, targets=".*")


def numbers(backbone: Backbone, role: str, sequences: Sequences) -> dict[str, Tensor]:
    """What the backbone computes of the same."""
    parameters = {n: p for n, p in backbone.role_parameters(role).items() if not n.startswith("head.")}
    result = {}
    with backbone.role(role):
        if role == "policy":
            numbers_N, entropies_N = backbone.response_logprobs(sequences)
            result["entropies"] = entropies_N.detach()
        elif role == "value":
            numbers_N = backbone.response_values(sequences)
        else:
            numbers_N = backbone.response_scores(sequences)
    gradients = torch.autograd.grad(numbers_N.sum(), list(parameters.values()), allow_unused=True)
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        result[key] = torch.zeros_like(parameter) if gradient is None else gradient
    return result | {"numbers": numbers_N.detach()}


def compare(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), what
    gradients = expected.keys() - {"numbers", "entropies"}
    largest = max(float(expected[key].abs().max()) for key in gradients)
    for key, wanted in expected.items():
        size = largest if key in gradients else max(1.0, float(wanted.abs().max()))
        error = float((found[key] - wanted).abs().max())
        assert error <= 5 * TOLERANCE * size, f"{what}: {key} differs by {error:.2g}, where the largest is {size:.2g}"


@torch.no_grad()
def check_step_0(backbone: Backbone, name: str, sequences: Sequences) -> None:
    anchor = backbone(sequences.ids_BT).logits
    # Frozen, as the backbone is: torch.matmul takes another kernel where a weight wants a gradient (Mamba's products).
    assert torch.equal(anchor, plain(name).requires_grad_(False)(input_ids=sequences.ids_BT).logits), (
        "the anchor is not the model"
    )
    with backbone.role("policy"):
        assert torch.equal(backbone(sequences.ids_BT).logits, anchor), "the policy does not start as the anchor"


@torch.no_grad()
def check_sampling(backbone: Backbone, name: str) -> Reading:
    """Log-probs of what was sampled, with equal and ragged prompts, against the plain model on each row."""
    prompts = [*PROMPTS, [3], [3], [13, 14, 15]]
    sampler = HFRollout(backbone, "policy", SamplingConfig(max_new_tokens=4, batch_size=4))
    rollout = sampler.generate(prompts, seed=0)
    model, _ = with_delta(backbone, name, "policy")
    for prompt, response, logprobs in zip(rollout.prompts, rollout.responses, rollout.logprobs, strict=True):
        logprobs_TV = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].log_softmax(-1)
        expected = logprobs_TV[len(prompt) - 1 :][torch.arange(len(response)), torch.tensor(response)]
        error = float((torch.tensor(logprobs) - expected).abs().max())
        assert error <= 5 * TOLERANCE, f"sampling differs by {error:.2g}"
    return sampler.reading


@torch.no_grad()
def check_merged(backbone: Backbone, name: str, sequences: Sequences) -> None:
    """The merged checkpoint in a plain model of its kind; there is none where layers share a weight."""
    merged = plain(name)
    if shared_weights(backbone.model):
        with raises("conflict", key="adapter.targets"):
            merged_state(backbone, "policy")
        return
    merged.load_state_dict(merged_state(backbone, "policy"))
    expected, _ = with_delta(backbone, name, "policy")
    same(f"merged {name}", merged(input_ids=sequences.ids_BT).logits, expected(input_ids=sequences.ids_BT).logits)


@torch.no_grad()
def check_peft(backbone: Backbone, name: str, sequences: Sequences) -> str:
    """The exported adapter in PEFT; why there is none, or ""."""
    if isinstance(reason := backbone.peft_form("policy"), str):
        return reason
    with tempfile.TemporaryDirectory() as folder:
        backbone.export_adapter("policy", Path(folder))
        loaded = PeftModel.from_pretrained(plain(name), folder)
    expected, _ = with_delta(backbone, name, "policy")
    same("PEFT", loaded(input_ids=sequences.ids_BT).logits, expected(input_ids=sequences.ids_BT).logits)
    return ""


def check_trunk(name: str, sequences: Sequences) -> bool:
    """Adapters on the last block: whether the rest is computed once, and what comes of it."""
    backbone = load_backbone(build(name))
    set_fast(backbone, trunk_cache_mib=64)
    backbone = load_backbone(backbone.model, fast=backbone.fast)
    add_roles(backbone, last_layers=1)
    for role in ("policy", "value", "reward"):
        perturb(backbone, role, 0.1)
    for role in ("value", "reward"):
        randomise_head(backbone, role)
    backbone.compute_once(sequences, token_budget=40)
    for role in ("policy", "value", "reward"):
        compare(f"{role} on a trunk", numbers(backbone, role, sequences), oracle(backbone, name, role, sequences))
    return len(backbone._trunk) > 0


def check_own_weights(name: str, sequences: Sequences) -> None:
    """A policy and a critic that are tuned whole, against plain models with the same weights."""
    backbone = load_backbone(build(name))
    expected = {}
    for role in ("policy", "value"):
        backbone.add_own_weights(role)
        perturb(backbone, role, 0.02)
    randomise_head(backbone, "value")
    for role in ("policy", "value"):
        model = plain(name).requires_grad_(True)
        tuned = model if role == "policy" else decoder_of(model)
        tuned.load_state_dict(backbone.own_models[role].state_dict())
        expected[role] = row_by_row(model, decoder_of(model), backbone, role, sequences)
        for key, parameter in tuned.named_parameters():
            expected[role][f"model.{key}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    compare_every_way(backbone, sequences, expected)


def same(what: str, found: Tensor, expected: Tensor) -> None:
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= TOLERANCE * max(1.0, size), f"{what}: logits differ by {error:.2g}, where the largest is {size:.2g}"


# ---- the page --------------------------------------------------------------------------------------------------------

HEAD = """# Models

Each row is a tiny random model of that type. Log-probs, entropies, values, scores, their gradients (of adapters and of
roles that are tuned whole), sampling, the merged checkpoint and the export to PEFT are compared with plain
transformers, row by row, in every run of the tests.
`tests/model_matrix.py` writes this page.

- **Packed**: no padding is computed, and a start that rows share is computed once. Other models compute padded rows,
  with the same numbers.
- **Trunk**: with `adapter.last_layers`, the blocks below are computed once.
- **Sampling** by transformers (`engine: hf`): what is read in one pass.
- **PEFT**: whether `adapter/` is written as an adapter of PEFT. Otherwise a role has `role.safetensors` only, and
  `pe-rlhf export RUN --format merged` writes a checkpoint.
- **Experts**: how a LoRA is put on experts that are fused into one weight. `all-linear` has them where PEFT's word has
  them; elsewhere a recipe names them, such as `targets: [q_proj, v_proj, experts.gate_up_proj, experts.down_proj]`.
- **Without**: the share of the weights that no adapter can be put on, and their names. A run says its own.

| model type | packed | trunk | sampling | PEFT | experts | without |
|---|---|---|---|---|---|---|
"""
READS = {
    Reading.EQUAL_ONCE: "equal prompts once",
    Reading.PADDED: "padded rows",
    Reading.EQUAL_LENGTHS: "rows of one length",
    Reading.SINGLY: "row by row",
    Reading.WITHOUT_CACHE: "row by row, no cache",
}


def row_of(name: str, outcome: Outcome) -> str:
    """A model's line of the page."""
    if outcome.refused:
        return f"| `{name}` | {outcome.refused} |"
    yes = {True: "yes", False: "–"}
    # PEFT's own words follow a colon; some of them come in the order of a set.
    peft = outcome.peft.partition(": ")[0] or "yes"
    cells = (yes[outcome.packed], yes[outcome.trunk], READS[outcome.reading], peft)
    cells = (*cells, outcome.experts or "–", outcome.bare or "–")
    return f"| `{name}` | {' | '.join(cells)} |"


def page() -> str:
    outcomes = {name: check(name) for name in sorted(MODELS)}
    good = [row_of(name, outcome) for name, outcome in outcomes.items() if not outcome.refused]
    refused = [row_of(name, outcome) for name, outcome in outcomes.items() if outcome.refused]
    end = "\n\n## Refused\n\n| model type | the sentence |\n|---|---|\n"
    return HEAD + "\n".join(good) + end + "\n".join(refused) + "\n"


def main() -> None:
    warnings.filterwarnings("ignore")
    console.quiet = True
    transformers_logging.set_verbosity_error()
    sys.stdout.write(page())


if __name__ == "__main__":
    main()
