"""Tiny models with random weights, one per architecture, and what the tests of many modules do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from pe_rlhf.adapters.gradients import Probe, ProbedStatistics
from pe_rlhf.adapters.layer_statistics import LayerStatistics, Need
from pe_rlhf.adapters.lora.init_registry import INITS as REGISTRY
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.types import Sequences
from tests.device import on_device

VOCABULARY = 64
EOS = 1
PAD = 0  # stands inside real text, too: a mask must never follow from comparing ids with it

# An init that is added is tested against the invariants, too; those that look at data get some from `statistics_for`.
ALL_INITS = sorted(REGISTRY)
INITS = [name for name in ALL_INITS if REGISTRY[name].needs is None]

SYSTEM = [40, 41, PAD, 43, 44, 45]  # what a chat template might start with

ROLES = ("policy", "value", "reward")
IDS_BT = torch.tensor([[5, 6, 7, 8, 9], [20, PAD, EOS, 22, 23]])

Settings = dict[str, Any]
SPECIAL: Settings = {"vocab_size": VOCABULARY, "bos_token_id": EOS, "eos_token_id": EOS}


def _llama(**changes: Any) -> PreTrainedModel:
    sizes: Settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: Settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**SPECIAL | sizes | heads | changes))


def _gpt2(**changes: Any) -> PreTrainedModel:
    sizes: Settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    no_dropout: Settings = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**SPECIAL | sizes | no_dropout | changes))


def _gpt_neo(**changes: Any) -> PreTrainedModel:
    # The window is shorter than the sequences of the tests, so that local attention differs from global.
    attention: Settings = {"window_size": 4, "attention_types": [[["global", "local"], 1]], "num_heads": 4}
    sizes: Settings = {"hidden_size": 32, "num_layers": 2, "max_position_embeddings": 64}
    return GPTNeoForCausalLM(GPTNeoConfig(**SPECIAL | sizes | attention | changes))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"llama": _llama, "gpt2": _gpt2, "gpt_neo": _gpt_neo}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of a family whose every parameter is random, biases and norms too: none is left where errors hide."""
    model = FAMILIES[family](**changes).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.18 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    # torch's own overloads are lost behind transformers' decorator
    return on_device(model.to(dtype))  # type: ignore[arg-type]


def mistral() -> PreTrainedModel:
    """Attention only to the last four tokens: the window reaches from a row back into its prefix, and ends there."""
    torch.manual_seed(0)
    sizes: Settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(**SPECIAL, **sizes, num_key_value_heads=2, head_dim=8, sliding_window=4))


def turning_by_length(rope_type: str) -> PreTrainedModel:
    """Rotary embeddings that are others past 16 tokens: `longrope` or `dynamic`."""
    rope: Settings = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 16}
    return tiny_model("llama", max_position_embeddings=64 if rope_type == "longrope" else 16, rope_parameters=rope)


def ragged_sequences() -> Sequences:
    """Three rows of different prompt and response lengths; ids that look like padding or an end are among them."""
    prompts = [[5, 6, 7], [8], [9, PAD, 11, 12, 13]]
    responses = [[20, 21, PAD, EOS], [22, 23, 24, 25, 26, 27, 28], [PAD]]
    return Sequences.pack(prompts, responses, pad_id=PAD)


def with_system_prompt() -> Sequences:
    """Rows that start with the same six tokens; one prompt is those and one more."""
    prompts = [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8], [*SYSTEM, 9, 10, 11, 12]]
    responses = [[20, 21, PAD, 1], [22, 23, 24, 25, 26, 27, 28], [PAD]]
    return Sequences.pack(prompts, responses, pad_id=PAD)


def pairs() -> Sequences:
    """Chosen responses, then the rejected ones, to two prompts of different lengths with nothing in common."""
    prompts = [[30, 31, 32, 33, 34, 35, 36, 37], [50, 51, PAD, 53, 54]] * 2
    responses = [[20, 21, 1], [22, 23, 24, 25, 1], [26, 1], [27, 28, 29]]
    return Sequences.pack(prompts, responses, pad_id=PAD)


def rows_of(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each row, without padding."""
    lengths = zip(sequences.prompt_lengths_B.tolist(), sequences.lengths_B.tolist(), strict=True)
    return [
        (row[:prompt], row[prompt:whole])
        for row, (prompt, whole) in zip(sequences.ids_BT.tolist(), lengths, strict=True)
    ]


def padded(rows: list[list[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and position ids of rows padded on a side; positions count the real tokens."""
    width = max(map(len, rows))
    ids, mask, positions = [], [], []
    for row in rows:
        missing, real = [0] * (width - len(row)), list(range(len(row)))
        left = side == "left"
        ids.append([PAD] * len(missing) + row if left else row + [PAD] * len(missing))
        mask.append(missing + [1] * len(row) if left else [1] * len(row) + missing)
        positions.append(missing + real if left else real + [len(row) - 1] * len(missing))
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(positions)


def backbone_with(*roles: str, init: str = "pissa", family: str = "llama") -> Backbone:
    """A tiny backbone with those roles, all at their initialisation."""
    backbone = load_backbone(tiny_model(family))
    for role in roles:
        add_role(backbone, role, init, rank=3, alpha=6)
    return backbone


def statistics_for(backbone: Backbone) -> ProbedStatistics:
    """Real statistics for any init: the likelihood of some responses, three sequences in each of two batches."""

    def probes(need: Need) -> list[Probe]:
        sequences = ragged_sequences().take(torch.tensor([0, 1, 2, 0, 1, 2]))
        sequences.ids_BT[3:, 0] += 1  # so that the second batch is another one
        mask_BT = torch.arange(sequences.ids_BT.shape[1]) < sequences.lengths_B[:, None]
        batch_B = torch.tensor([0, 0, 0, 1, 1, 1])
        ids_BT, predicts_BT = sequences.ids_BT.to(backbone.device), sequences.predicts_BT.to(backbone.device)

        def loss() -> Tensor:
            log_probs_BTV = backbone(ids_BT).logits[:, :-1].log_softmax(dim=-1)
            chosen_BT = log_probs_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
            return -chosen_BT[predicts_BT[:, :-1]].mean()

        return [Probe(loss, mask_BT.to(backbone.device), batch_B.to(backbone.device))]

    return ProbedStatistics(backbone.base_layer, probes)


class OtherWeights:
    """Weights that a base might have had before it was quantised, for inits of what was lost."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def visit(self, modules: Sequence[str], need: Need, take: Callable[[str, LayerStatistics], None]) -> None:
        generator = torch.Generator().manual_seed(4)
        for name in modules:
            weight_OI = self._backbone.base_weight(name).float()
            lost_OI = 0.1 * torch.randn(weight_OI.shape, generator=generator).to(weight_OI.device)
            take(name, LayerStatistics(original_OI=weight_OI + lost_OI))


def add_role(backbone: Backbone, role: str, init: str, **settings: Any) -> None:
    """`add_adapter`, with statistics for the inits that need some."""
    needs = REGISTRY[init].needs
    source = OtherWeights(backbone) if needs == "original weight" else statistics_for(backbone) if needs else None
    backbone.add_adapter(role, init=init, statistics=source, **settings)


@torch.no_grad()
def role_logits(backbone: Backbone, role: str, ids_BT: Tensor = IDS_BT, mask_BT: Tensor | None = None) -> Tensor:
    """The logits of a role, without a gradient."""
    with backbone.role(role):
        return backbone(ids_BT, mask_BT).logits


def perturb(backbone: Backbone, role: str, size: float = 0.1) -> None:
    """Move what a role trains by random amounts, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.role_parameters(role).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def randomise_head(backbone: Backbone, role: str) -> None:
    """Give a head random weights: at zero, where it starts, it would hide whatever is wrong before it."""
    with torch.no_grad():
        weight = backbone.head(role).weight
        weight.copy_(torch.empty(weight.shape).normal_(generator=torch.Generator().manual_seed(2)))


def set_fast(backbone: Backbone, **changes: Any) -> None:
    """Change how a backbone's passes save time, which is otherwise said when it is made."""
    backbone.fast = replace(backbone.fast, **changes)


def add_trained_roles(backbone: Backbone, last_layers: int | None = None) -> Backbone:
    """Policy, value and reward with adapters and heads that have moved."""
    for role in ROLES:
        backbone.add_adapter(role, init="pissa", rank=3, alpha=6, last_layers=last_layers)
        perturb(backbone, role)
    for role in ("value", "reward"):
        randomise_head(backbone, role)
    return backbone


def role_loss(backbone: Backbone, role: str, sequences: Sequences) -> Tensor:
    """A loss for the active role that moves all it trains: likelihood, squared error of values, or pairs of scores."""
    if role == "value":
        return (backbone.response_values(sequences) - 1).square().mean()
    if role == "reward":
        scores_B = backbone.response_scores(sequences)
        return -F.logsigmoid(scores_B[0] - scores_B[1:]).mean()
    return -backbone.response_logprobs(sequences)[0].mean()


def outputs(backbone: Backbone, role: str, sequences: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
    """What a role says of the sequences, and the gradients of its loss."""
    parameters = backbone.role_parameters(role)
    with backbone.role(role):
        if role == "value":
            numbers = backbone.response_values(sequences)
        elif role == "reward":
            numbers = backbone.response_scores(sequences)
        else:
            numbers = backbone.response_logprobs(sequences)[0]
        gradients = torch.autograd.grad(role_loss(backbone, role, sequences), list(parameters.values()))
    return numbers.detach(), dict(zip(parameters, gradients, strict=True))


def train_role(backbone: Backbone, role: str, steps: int = 4) -> None:
    """Real AdamW steps on what a role trains."""
    sequences = ragged_sequences()
    optimizer = torch.optim.AdamW(backbone.role_parameters(role).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        with backbone.role(role):
            role_loss(backbone, role, sequences).backward()
        optimizer.step()


def with_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a module gives, and the gradient of its input for a random one of its output."""
    x = x.detach().requires_grad_()
    out = module(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return out, torch.autograd.grad(out, x, upstream)[0]
