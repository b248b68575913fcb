"""One frozen model that plays every role.

The base is loaded once and never written to. `policy`, `value` and `reward` are adapters (and scalar heads) on it, the
anchor is the base with no adapter at all, and a role is a context manager:

    backbone = load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct")
    backbone.add_adapter("policy", init="pissa", rank=16, alpha=32)
    with backbone.role("policy"):
        logits = backbone(input_ids).logits
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import ModelOutput

from pe_rlhf.adapters.anchored import Scaling
from pe_rlhf.adapters.build import AdapterSpec, new_adapters, saved_adapter
from pe_rlhf.adapters.export import export_peft
from pe_rlhf.adapters.statistics import LayerStatistics, StatisticsSource
from pe_rlhf.adapters.targets import Targets, find_targets, linear_modules
from pe_rlhf.adapters.wrapped import RoleState, WrappedLayer, merged_weight, weight_out_in
from pe_rlhf.algo.logprobs import token_logprobs
from pe_rlhf.causal_lm import eos_token_ids, find_device, freeze, load_causal_lm, logits_head, position_arguments
from pe_rlhf.distributed import world_size
from pe_rlhf.recompute import BlockCheckpointing
from pe_rlhf.seeding import derive_seed
from pe_rlhf.trunk import FrozenTrunk
from pe_rlhf.types import Sequences, micro_batches
from reward.errors import InputError
from reward.head import ScalarHead

ANCHOR = "anchor"
# Roles whose names start so have a scalar head: `reward`, `reward_2`, `value`.
HEAD_ROLES = ("value", "reward")


def load_backbone(
    model: str | Path | PreTrainedModel,
    *,
    dtype: str = "float32",
    device: str = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Backbone:
    """Load a base once, for all roles.

    Args:
        model: a hub id, a directory, `pip:NAME`, or a model that is loaded already (it is taken over, not copied).
        dtype: `float32`, `bfloat16` or `float16`, of the base; adapters and heads are always fp32.
        device: `auto` is the current CUDA device where there is one, else the CPU.
        attention: transformers' attention implementation: `sdpa` (`eager` where the model has no sdpa), `eager`,
            `flash_attention_2`, …
    """
    if isinstance(model, PreTrainedModel):
        return Backbone(model, tokenizer)
    loaded, own_tokenizer = load_causal_lm(
        str(model),
        dtype=dtype,
        device=find_device(device),
        attention=attention,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    return Backbone(loaded, tokenizer or own_tokenizer, name=str(model))


class Backbone(nn.Module):
    """A causal language model with its weights frozen, and the roles on it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name or model.config.name_or_path or ""
        self.heads = nn.ModuleDict()
        self.specs: dict[str, AdapterSpec] = {}
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self._tokenizer = tokenizer
        self._state = RoleState()
        self._kept_fingerprint: str | None = None
        self._checkpointing: BlockCheckpointing | None = None
        self._trunk = FrozenTrunk(model)
        self.trunk_cache_mib = 0
        freeze(model)
        self.train(False)
        self.logits_head = logits_head(model)

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise InputError("this backbone was made without a tokenizer")
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def pad_token_id(self) -> int:
        """An id to fill padding with. It may be a real token: what is padding follows from lengths alone."""
        pad = getattr(self._tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) else (self.eos_token_ids or [0])[0]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model takes, where its config says so."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def base_fingerprint(self) -> str:
        """SHA-256 over the base weights, names and shapes included: the identity of the anchor, whatever its name."""
        if self._kept_fingerprint is not None:
            return self._kept_fingerprint
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if ".adapters." in name:
                continue
            digest.update(f"{name.replace('.base.', '.')} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def keep_fingerprint(self) -> None:
        """Compute it while the weights are whole, before ZeRO-3 splits them, and keep it."""
        self._kept_fingerprint = self.base_fingerprint()

    # ---- roles ------------------------------------------------------------------------------------------------------

    @property
    def active_role(self) -> str:
        return self._state.active or ANCHOR

    @property
    def roles(self) -> list[str]:
        return [ANCHOR, *self.specs]

    @contextmanager
    def role(self, name: str) -> Iterator[Backbone]:
        """Play a role: within the block its adapter is on. Roles nest; the one before is back after the block."""
        if name not in self.roles:
            raise InputError(f"there is no role {name!r} on this backbone; there are {', '.join(self.roles)}")
        before = self._state.active
        self._state.active = None if name == ANCHOR else name
        try:
            yield self
        finally:
            self._state.active = before

    def add_adapter(
        self,
        role: str,
        init: str = "lora",
        rank: int = 16,
        alpha: float = 32.0,
        targets: Targets = "all-linear",
        last_layers: int | None = None,
        scaling: Scaling = "standard",
        dropout: float = 0.0,
        seed: int = 0,
        init_options: dict[str, Any] | None = None,
        statistics: StatisticsSource | Mapping[str, LayerStatistics] | None = None,
    ) -> None:
        """Add a role: an anchored adapter on the target layers, and a scalar head for `value` and `reward`.

        Whatever the init, the role starts as the anchor exactly. Raises `InputError` for a role that is there already,
        an unknown init or option, targets that match nothing, or an init that needs `statistics` and has none.
        """
        self._refuse_taken(role)
        modules = tuple(find_targets(self.model, targets, last_layers))
        spec = AdapterSpec(init, rank, alpha, scaling, dropout, modules, init_options or {})
        adapters = new_adapters(spec, self.base_weight, lambda name: derive_seed(seed, role, name), statistics)
        self._install(role, spec, adapters, self._new_head(role))

    def base_weight(self, name: str) -> Tensor:
        """The frozen weight _OI of a layer that adapters can be put on; a quantised one is dequantised."""
        return weight_out_in(self.base_layer(name))

    def base_layer(self, name: str) -> nn.Module:
        """The frozen module of a layer that adapters can be put on."""
        return self._wrap(name).base

    def copy_role(self, source: str, target: str) -> None:
        """Add a role that starts as a copy of another, head and all (the critic from the reward model)."""
        self._refuse_taken(target)
        adapters = {name: copy.deepcopy(layer.adapters[source]) for name, layer in self._layers(source)}
        head = self._new_head(target)
        if head is not None and source in self.heads:
            head.load_state_dict(self.heads[source].state_dict())
        self._install(target, self.specs[source], adapters, head)

    def load_role(self, role: str, spec: AdapterSpec, state: dict[str, Tensor]) -> None:
        """Add a role, or set one that is there, to what `role_state` gave.

        Raises `InputError` where the tensors are not those of such a role on this model.
        """
        try:
            weights = {name: weight_out_in(self._wrap(name).base) for name in spec.modules}
            adapters = {name: saved_adapter(spec, weight, _part(state, name)) for name, weight in weights.items()}
            head = self._new_head(role)
            if head is not None:
                head.load_state_dict(_part(state, "head"))
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"the saved adapter does not fit role {role!r} on {self.name}") from error
        self._install(role, spec, adapters, head)

    def head(self, role: str) -> ScalarHead:
        """The scalar head of a role that has one."""
        head = self.heads[role]
        assert isinstance(head, ScalarHead)
        return head

    def set_role_state(self, role: str, state: dict[str, Tensor]) -> None:
        """Set the tensors of a role that is there in place, so that an optimizer on them stays valid."""
        own = dict(self._named(role, nn.Module.state_dict))
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in state.items()}:
            raise InputError(f"the saved tensors are not those of role {role!r} on {self.name}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def role_state(self, role: str) -> dict[str, Tensor]:
        """All tensors of a role by name: A, B, their initial values, and the head; copies, on the CPU."""
        return {
            name: t.detach().to("cpu", copy=True).contiguous() for name, t in self._named(role, nn.Module.state_dict)
        }

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters of a role that an optimizer trains, by name."""
        named = self._named(role, lambda module: dict(module.named_parameters()))
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def export_adapter(self, role: str, path: str | Path, rank: int | None = None) -> None:
        """Write a role as a plain PEFT LoRA of rank 2r (r where B0 is zero) for the original base; see `export.py`.

        `rank` fills a smaller one up with zeros.
        """
        layers = {name: layer.adapters[role] for name, layer in self._layers(role)}
        head = self.heads[role] if role in self.heads else None  # noqa: SIM401  (a ModuleDict has no get)
        names = list(linear_modules(self.model))
        export_peft(layers, head, role=role, base_model=self.name, all_names=names, path=Path(path), rank=rank)

    def export_rank(self, role: str) -> int:
        """The rank that `export_adapter` writes unless told otherwise."""
        return max(layer.adapters[role].factors().A_RI.shape[0] for _, layer in self._layers(role))  # type: ignore[operator]

    def merged_tensors(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """The base's checkpoint, name by name, with `W0 + ΔW` of a role in it; computed fresh, the base is not touched.

        A tensor that the model has under two names comes once, under the first.
        """
        layers = {} if role == ANCHOR else dict(self._layers(role))
        seen: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            module = name.removesuffix(".base.weight")
            if ".adapters." in name or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            layer = layers.get(module)
            yield name.replace(".base.", "."), tensor if layer is None else merged_weight(layer, role)

    def train(self, mode: bool = True) -> Backbone:
        """Turn dropout of adapters on or off. The base stays as it is: it has none."""
        super().train(False)
        for module in self.model.modules():
            if isinstance(module, WrappedLayer):
                module.adapters.train(mode)
        self.training = mode
        return self

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        """The active role's output, as HF models give it.

        Args:
            input_ids: _BT.
            attention_mask: _BT, 1 at real tokens; padding may stand on either side.

        Returns:
            anchor and policy: `.logits` _BTV. `value`: `.logits` _BT1, one number per token. `reward`: `.logits` _B1,
            the score at the last real token.
        """
        if self.active_role not in self.heads:
            return self.model(input_ids=input_ids, **position_arguments(attention_mask), use_cache=False)
        numbers_BT = self.heads[self.active_role](self._hidden(input_ids, attention_mask))
        if not self.active_role.startswith("reward"):
            return TokenClassifierOutput(logits=numbers_BT[..., None])
        if attention_mask is None:
            return SequenceClassifierOutput(logits=numbers_BT[:, -1:])
        position_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        last_B1 = (attention_mask * position_T).argmax(dim=1, keepdim=True)
        return SequenceClassifierOutput(logits=numbers_BT.gather(1, last_B1))

    def response_logprobs(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies _N of the response tokens under the active role; logits exist for those alone."""
        targets_N = sequences.targets_N.to(self.device)
        return token_logprobs(self._response_hidden(sequences), self.logits_head, targets_N, temperature)

    def response_values(self, sequences: Sequences) -> Tensor:
        """The active role's head _N at the positions that predict the response tokens."""
        return self.heads[self.active_role](self._response_hidden(sequences))

    def response_scores(self, sequences: Sequences) -> Tensor:
        """The active role's head _B at the last token of each response."""
        hidden_BTH = self._sequence_hidden(sequences)
        rows_B = torch.arange(len(sequences), device=self.device)
        return self.heads[self.active_role](hidden_BTH[rows_B, sequences.lengths_B.to(self.device) - 1])

    def keeps_trunk(self, tokens: int) -> bool:
        """Whether there is a trunk below the first adapter whose states of that many tokens fit `trunk_cache_mib`.

        Not on several ranks: a row is not on the same one in every pass.
        """
        if world_size() > 1:
            return False
        size: int = self.model.get_input_embeddings().embedding_dim  # type: ignore[assignment]
        return self._trunk.depth > 0 and tokens * size * self.model.dtype.itemsize <= self.trunk_cache_mib * 2**20

    @torch.no_grad()
    def trunk_rows(
        self, sequences: Sequences, micro_batch_tokens: int, advance: Callable[[int], None] = lambda _: None
    ) -> list[Tensor]:
        """Hidden states _TH of each row below the first adapter: the same in every role and at every step."""
        rows: list[Tensor] = [torch.empty(0)] * len(sequences)
        for index in micro_batches(sequences.lengths_B, micro_batch_tokens):
            part = sequences.take(index)
            states_BTH = self._trunk.states(lambda part=part: self._hidden(part.ids_BT.to(self.device)))
            for i, hidden_TH, length in zip(index.tolist(), states_BTH, part.lengths_B, strict=True):
                rows[i] = hidden_TH[:length].clone()
            advance(len(index))
        return rows

    def with_trunk(self, sequences: Sequences, micro_batch_tokens: int) -> Sequences:
        """The sequences with their trunk states, or as they are where there is no trunk or no room to keep it."""
        if not self.keeps_trunk(sequences.ids_BT.numel()):
            return sequences
        rows = self.trunk_rows(sequences, micro_batch_tokens)
        return replace(sequences, trunk_BTH=pad_sequence(rows, batch_first=True))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass, in the role they were computed in."""
        self._checkpointing = BlockCheckpointing(self.model, lambda: self.role(self.active_role))

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _hidden(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        with self._checkpointing.one_pass() if self._checkpointing else nullcontext():
            arguments = position_arguments(attention_mask)
            return self.model.base_model(input_ids=ids_BT, **arguments, use_cache=False).last_hidden_state

    def _sequence_hidden(self, sequences: Sequences) -> Tensor:
        with nullcontext() if sequences.trunk_BTH is None else self._trunk.given(sequences.trunk_BTH):
            return self._hidden(sequences.ids_BT.to(self.device))

    def _response_hidden(self, sequences: Sequences) -> Tensor:
        return self._sequence_hidden(sequences)[sequences.predicts_BT.to(self.device)]

    def _refuse_taken(self, role: str) -> None:
        if role in self.roles or not role.isidentifier():
            raise InputError(f"cannot add a role {role!r}: the name is taken or is not an identifier")

    def _new_head(self, role: str) -> ScalarHead | None:
        if not role.startswith(HEAD_ROLES):
            return None
        size: int = self.model.get_input_embeddings().embedding_dim  # type: ignore[assignment]
        return ScalarHead(size, train_bias=role.startswith("value")).to(self.device)

    def _install(self, role: str, spec: AdapterSpec, adapters: dict[str, nn.Module], head: ScalarHead | None) -> None:
        """Put a role that is complete on the layers, in place of the one of that name."""
        if role in self.specs:
            for _, layer in self._layers(role):
                del layer.adapters[role]
        for name, adapter in adapters.items():
            self._wrap(name).adapters[role] = adapter
        if head is not None:
            self.heads[role] = head
        self.specs[role] = spec
        self.train(self.training)

    def _wrap(self, name: str) -> WrappedLayer:
        parent_name, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        layer = getattr(parent, leaf)
        if not isinstance(layer, WrappedLayer):
            layer = WrappedLayer(layer, self._state)
            setattr(parent, leaf, layer)
        return layer

    def _layers(self, role: str) -> list[tuple[str, WrappedLayer]]:
        if role not in self.specs:
            known = ", ".join(self.specs) or "none"
            raise InputError(f"there is no adapter {role!r} on this backbone; there are {known}")
        named = ((name, module) for name, module in self.model.named_modules() if isinstance(module, WrappedLayer))
        return [(name, layer) for name, layer in named if role in layer.adapters]

    def _named(self, role: str, tensors_of: Any) -> Iterator[tuple[str, Any]]:
        modules = {name: layer.adapters[role] for name, layer in self._layers(role)}
        if role in self.heads:
            modules["head"] = self.heads[role]
        for name, module in modules.items():
            yield from ((f"{name}.{part}", tensor) for part, tensor in tensors_of(module).items())


def _part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
