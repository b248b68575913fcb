"""One frozen model that plays every role.

The base is loaded once and never written to. `policy`, `value` and `reward` are adapters (and scalar heads) on it, the
anchor is the base with no adapter at all, and a role is a context manager:

    backbone = load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct")
    backbone.add_adapter("policy", init="pissa", rank=16, alpha=32)
    with backbone.role("policy"):
        logits = backbone(input_ids).logits
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import ModelOutput

from pe_rlhf.algo.logprobs import pieces_of, token_logprobs
from pe_rlhf.model.fast.block_checkpointing import BlockCheckpointing
from pe_rlhf.model.fast.gated_mlp import lighten_mlps
from pe_rlhf.model.fast.packed_attention import enable_packing, is_packing_enabled, packed_hidden
from pe_rlhf.model.fast.packing import Packing, common_length, kept_tokens
from pe_rlhf.model.fast.rms_norm import shorten_norms
from pe_rlhf.model.fast.trunk import FrozenTrunk
from pe_rlhf.model.loading import (
    DTYPES,
    check_logits,
    eos_token_ids,
    find_device,
    freeze,
    keep_states_together,
    load_causal_lm,
    logits_of,
    position_arguments,
    use_sound_attention,
)
from pe_rlhf.model.micro_batches import micro_batches, own_micro_batches
from pe_rlhf.model.roles import ModelWithRoles
from pe_rlhf.system.distributed import is_sharded, max_over_ranks, world_size
from pe_rlhf.types import Sequences
from reward.errors import InputError

LARGER_WITHOUT_GRADIENTS = 4  # so many times the tokens in one pass


def load_backbone(
    model: str | Path | PreTrainedModel,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization: str = "none",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Backbone:
    """Load a base once, for all roles.

    Args:
        model: a hub id, a directory, `pip:NAME`, or a model that is loaded already: it is taken over, not copied, and
            stays as it is; what follows, but for `tokenizer`, says how one is loaded.
        dtype: `float32`, `bfloat16` or `float16`, of the base; adapters and heads are always fp32.
        device: `auto` is the current CUDA device where there is one, else the CPU.
        attention: transformers' attention implementation: `sdpa` (`eager` where the model has no sdpa), `eager`,
            `flash_attention_2`, …
        quantization: `4bit` (NF4) or `8bit` (LLM.int8) by bitsandbytes, of the base alone.

    Raises `InputError` for a model that cannot be had, and for a dtype that is none of those.
    """
    if isinstance(model, PreTrainedModel):
        return Backbone(model, tokenizer)
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"load_backbone: dtype {dtype!r} is none of {', '.join(DTYPES)}")
    loaded, own_tokenizer = load_causal_lm(
        str(model),
        dtype=dtype,
        device=find_device(str(device)),
        attention=attention,
        trust_remote_code=trust_remote_code,
        revision=revision,
        quantization=quantization,
    )
    return Backbone(loaded, tokenizer or own_tokenizer, name=str(model))


class Backbone(ModelWithRoles):
    """A causal language model with its weights frozen, and what each role on it computes."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None
    ) -> None:
        super().__init__(model, name or model.config.name_or_path or "")
        if self.device.type == "cuda":
            use_sound_attention()
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self._tokenizer = tokenizer
        self._recomputes = False
        self._checkpointing: dict[PreTrainedModel, BlockCheckpointing] = {}
        self._trunk = FrozenTrunk(model)
        self.trunk_cache_mib = 0
        self.packing = True
        freeze(model)
        self.train(False)
        check_logits(model)
        keep_states_together(model)
        shorten_norms(model)
        lighten_mlps(model)
        self._can_pack = enable_packing(model, self.precision)

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise InputError("this backbone was made without a tokenizer")
        return self._tokenizer

    @property
    def pad_token_id(self) -> int:
        """An id to fill padding with. It may be a real token: what is padding follows from lengths alone."""
        pad = getattr(self._tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) else (self.eos_token_ids or [0])[0]

    @property
    def precision(self) -> torch.dtype:
        """What passes over the same tokens agree to, in other batches or engines. LLM.int8 rounds its inputs, too."""
        return torch.bfloat16 if getattr(self.model, "is_loaded_in_8bit", False) else self.model.dtype

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model takes, where its config says so."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def logits_head(self) -> Callable[[Tensor], Tensor]:
        """The function from last hidden states to logits in the active role."""
        return partial(logits_of, self.active_model)

    def base_fingerprint(self) -> str:
        """SHA-256 over the base weights, names and shapes included: the identity of the anchor, whatever its name."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if ".adapters." in name:
                continue
            digest.update(f"{name.replace('.base.', '.')} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def anchor_sha256(self) -> str:
        """`base_fingerprint`, taken once: the base is never written to, and a 7B model takes about 10 seconds.

        Under ZeRO-3 it has to be asked for while the weights are whole.
        """
        return self.base_fingerprint()

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
            # As anybody calls the model: without its cache keys lie otherwise in memory, and some CPUs round otherwise.
            return self.active_model(input_ids=input_ids, **position_arguments(attention_mask))
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
        hidden_NH, is_own = self._hidden_at(sequences, sequences.predicts_BT), self.active_role in self.own_models
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        pieces = pieces_of(len(targets_N), vocabulary, self.device.type)
        if is_sharded(self.model):  # each call gathers the head's weight, on all ranks together
            pieces = max_over_ranks(pieces)
        return token_logprobs(hidden_NH, self.logits_head, targets_N, temperature, pieces, train_head=is_own)

    def response_values(self, sequences: Sequences) -> Tensor:
        """The active role's head _N at the positions that predict the response tokens."""
        return self.heads[self.active_role](self._hidden_at(sequences, sequences.predicts_BT))

    def response_scores(self, sequences: Sequences) -> Tensor:
        """The active role's head _B at the last token of each response."""
        position_T = torch.arange(sequences.ids_BT.shape[1])
        is_last_BT = position_T == sequences.lengths_B[:, None] - 1
        return self.heads[self.active_role](self._hidden_at(sequences, is_last_BT))

    @property
    def packs(self) -> bool:
        """Whether passes over sequences are packed: not where that was switched off or the model cannot take it."""
        return self.packing and self._can_pack and is_packing_enabled(self.model)

    def budget_lengths(self, sequences: Sequences) -> Tensor:
        """How many tokens _B of a budget each row takes up: all but those that every row starts with."""
        shared = common_length(sequences) if self.packs else 0
        return sequences.lengths_B - shared + kept_tokens(shared)

    def own_micro_batches(self, lengths_B: Tensor, token_budget: int) -> list[tuple[Tensor, bool]]:
        """This rank's micro-batches of rows of those `budget_lengths`; see `distributed.own_micro_batches`.

        Without gradients they are larger: what a pass needs then is a layer's activations, not all that it has made.
        """
        token_budget *= 1 if torch.is_grad_enabled() else LARGER_WITHOUT_GRADIENTS
        return own_micro_batches(lengths_B, token_budget, padded=not self.packs)

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
        for index in micro_batches(sequences.lengths_B, micro_batch_tokens, padded=True):
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
        self._recomputes = True

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _hidden(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states _BTH."""
        arguments = position_arguments(attention_mask)
        with self._recomputing():
            return self.active_model.base_model(input_ids=ids_BT, use_cache=False, **arguments).last_hidden_state

    def _recomputing(self) -> AbstractContextManager[None]:
        if not self._recomputes:
            return nullcontext()
        model = self.active_model
        if model not in self._checkpointing:
            self._checkpointing[model] = BlockCheckpointing(model, lambda: self.role(self.active_role))
        return self._checkpointing[model].one_pass()

    def _hidden_at(self, sequences: Sequences, wanted_BT: Tensor) -> Tensor:
        """Last hidden states _NH at some of the positions, of which none lies before a prompt's last token."""
        ids_BT = sequences.ids_BT.to(self.device)
        trunk_BTH = sequences.trunk_BTH if self.active_model is self.model else None
        if not self.packs:
            with self._trunk.given(trunk_BTH):
                return self._hidden(ids_BT)[wanted_BT.to(self.device)]
        packing = Packing.of(sequences, self.device)
        given_1LH = None if trunk_BTH is None else packing.take(trunk_BTH)[None]
        with self._trunk.given(given_1LH), self._recomputing():
            hidden_LH = packed_hidden(self.active_model.base_model, ids_BT, packing)
        return hidden_LH[packing.take(wanted_BT).to(self.device)]
