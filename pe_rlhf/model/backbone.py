"""One frozen model that plays every role.

The base is loaded once and never written to. `policy`, `value` and `reward` are adapters (and scalar heads) on it, the
anchor is the base with no adapter at all, and a role is a context manager:

    backbone = load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct")
    backbone.add_adapter("policy", init="pissa", rank=16, alpha=32)
    with backbone.role("policy"):
        logits = backbone(input_ids).logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import ModelOutput

from pe_rlhf.adapters.targets import note_layers_without_effect
from pe_rlhf.algo.logprobs import pieces_of, token_logprobs
from pe_rlhf.model.fast.block_checkpointing import BlockCheckpointing
from pe_rlhf.model.fast.gated_mlp import lighten_mlps
from pe_rlhf.model.fast.packed_attention import enable_packing, is_packing_enabled, packed_hidden
from pe_rlhf.model.fast.packing import Packing
from pe_rlhf.model.fast.rms_norm import shorten_norms
from pe_rlhf.model.fast.trunk import TokenRows, TrunkCache
from pe_rlhf.model.identity import fingerprint, fingerprint_by_files
from pe_rlhf.model.loading import (
    DTYPES,
    eos_token_ids,
    find_device,
    freeze,
    keep_states_together,
    load_causal_lm,
    longest_sequence,
    position_arguments,
    use_sound_attention,
)
from pe_rlhf.model.names import find_adapter, resolve_model
from pe_rlhf.model.noise import noisy_weights
from pe_rlhf.model.probes import (
    check_model,
    count_decoder_layers,
    decoder_of,
    logits_of,
    probe_tokens,
)
from pe_rlhf.model.role_exports import RolesToExport
from pe_rlhf.model.whole import use_published_attention
from pe_rlhf.system.distributed import gathered, world_size
from pe_rlhf.types import Sequences
from reward.errors import InputError


@dataclass(frozen=True)
class FastPath:
    """How passes save time and memory; see `fast/README.md`.

    Attributes:
        packing: compute no padding, and what rows start with only once, where the model can take it.
        trunk_cache_mib: memory for the hidden states below the first adapter, MiB; 0 keeps none.
        gradient_checkpointing: compute activations again in the backward pass, block by block.
    """

    packing: bool = True
    trunk_cache_mib: int = 0
    gradient_checkpointing: bool = False


USUAL = FastPath()


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
    fast: FastPath = USUAL,
) -> Backbone:
    """Load a base once, for all roles.

    Args:
        model: a hub id, a directory, `pip:NAME`, or a model that is loaded already: it is taken over, not copied, and
            stays as it is. What follows, except `tokenizer` and `fast`, says how one is loaded.
        dtype: `float32`, `bfloat16` or `float16`, of the base; adapters and heads are always fp32.
        device: `auto` is the current CUDA device where there is one, else the CPU.
        attention: transformers' attention implementation: `sdpa` (`eager` where the model has no sdpa), `eager`,
            `flash_attention_2`, …
        quantization: `4bit` (NF4) or `8bit` (LLM.int8) by bitsandbytes, of the base only.
        fast: how passes save time and memory.

    Raises `InputError` for a model that cannot be had, and for another dtype.
    """
    if isinstance(model, PreTrainedModel):
        return Backbone(model, tokenizer, fast=fast)
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(
            f"load_backbone: unknown dtype {dtype!r}; there are {', '.join(DTYPES)}", kind="unknown", key="dtype"
        )
    load = partial(
        load_causal_lm,
        str(model),
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    loaded, own_tokenizer = load(device=find_device(str(device)), quantization=quantization)
    # An adapter's folder is merged into a model, which is what exports have to name as their base.
    source = resolve_model(str(model))
    name = source if find_adapter(str(model)) else str(model)
    backbone = Backbone(loaded, tokenizer or own_tokenizer, name, fast)
    backbone.source = source
    if quantization != "none":
        backbone.load_original = lambda: load(device=torch.device("cpu"))[0]
    return backbone


class Backbone(RolesToExport):
    """A causal language model with its weights frozen, and what each role on it computes."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
        fast: FastPath = USUAL,
    ) -> None:
        super().__init__(model, name or model.config.name_or_path or "")
        if self.device.type == "cuda":
            use_sound_attention()
        self.source: str | None = None  # the folder or hub id that the model was read from and is as it is there
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self._tokenizer = tokenizer
        self.fast = fast
        self._checkpointing: dict[PreTrainedModel, BlockCheckpointing] = {}
        self._trunk = TrunkCache(model, fast.trunk_cache_mib)
        freeze(model)
        self.train(False)
        use_published_attention(model)
        count_decoder_layers(model)
        check_model(model)
        note_layers_without_effect(model, lambda: model(input_ids=probe_tokens(model), use_cache=False).logits)
        keep_states_together(model)
        shorten_norms(model)
        lighten_mlps(model)
        self.can_pack = enable_packing(model, self.precision)

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise InputError("this backbone was made without a tokenizer", kind="missing", key="tokenizer")
        return self._tokenizer

    @property
    def pad_token_id(self) -> int:
        """An id to fill padding with. It may be a real token: what is padding follows from lengths only."""
        candidates = (getattr(self._tokenizer, "pad_token_id", None), *self.eos_token_ids)
        # A tokenizer may have been given a pad token that the model has no embedding of.
        return next((pad for pad in candidates if isinstance(pad, int) and 0 <= pad < self.vocabulary), 0)

    @property
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""
        return self.model.get_input_embeddings().num_embeddings  # type: ignore[return-value]

    @property
    def precision(self) -> torch.dtype:
        """What passes over the same tokens agree to, in other batches or engines. LLM.int8 rounds its inputs, too."""
        return torch.bfloat16 if getattr(self.model, "is_loaded_in_8bit", False) else self.model.dtype

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model takes, in tokens, where its config says so."""
        return longest_sequence(self.model.config)

    @property
    def longest_sequence(self) -> int:
        """`max_positions`, or more than any sequence has where the config does not say."""
        return self.max_positions or 10**9

    @property
    def logits_head(self) -> Callable[[Tensor], Tensor]:
        """The function from last hidden states to logits in the active role."""
        return partial(logits_of, self.active_model)

    def base_fingerprint(self) -> str:
        """SHA-256 over the base weights, names and shapes included: the identity of the anchor, whatever its name."""
        return fingerprint(self.model)

    @cached_property
    def anchor_sha256(self) -> str:
        """`base_fingerprint`, taken once for the files that it was read from: the base is never written to.

        Under ZeRO-3 it has to be asked for while the weights are whole.
        """
        return fingerprint_by_files(self.model, self.source) if self.source else self.base_fingerprint()

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
        """Log-probs and entropies _N of the response tokens under the active role; logits exist only for those."""
        targets_N = sequences.targets_N.to(self.device)
        hidden_NH, is_own = self._hidden_at(sequences, sequences.predicts_BT), self.active_role in self.own_models
        pieces = pieces_of(len(targets_N), self.vocabulary, self.device.type)
        head = self.active_model.get_output_embeddings()
        assert isinstance(head, torch.nn.Module)  # that there is one was checked
        with gathered(head):  # once for all pieces, of which ranks have different numbers
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
        return self.fast.packing and self.can_pack and is_packing_enabled(self.model)

    def compute_once(self, rows: TokenRows, token_budget: int, advance: Callable[[int], None] = lambda _: None) -> None:
        """Compute now, for all later passes over these rows, what is the same in every role and at every step.

        That is the frozen trunk below the first adapter, where there is one and its hidden states fit
        `FastPath.trunk_cache_mib`; otherwise nothing is done. `advance` gets the number of rows computed.
        """
        # With several ranks a row is not on the same one in every pass.
        if world_size() == 1 and self._trunk.has_room(int(rows.lengths_B.sum())):
            self._trunk.fill(rows, token_budget, lambda part: self._hidden(part.ids_BT.to(self.device)), advance)

    @contextmanager
    def noisy_base(self, sigma: float, seed: int) -> Iterator[None]:
        """Within it every role is on a base with noise (`pe_rlhf/model/noise.py`); its weights are not touched."""
        with self._trunk.set_aside(), noisy_weights(self.model, sigma, seed):
            yield

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _hidden(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states _BTH."""
        arguments = position_arguments(attention_mask)
        with self._recomputing():
            return decoder_of(self.active_model)(input_ids=ids_BT, use_cache=False, **arguments).last_hidden_state

    def _recomputing(self) -> AbstractContextManager[None]:
        if not self.fast.gradient_checkpointing:
            return nullcontext()
        model = self.active_model
        if model not in self._checkpointing:
            self._checkpointing[model] = BlockCheckpointing(model, self._as_now)
        return self._checkpointing[model].one_pass()

    def _as_now(self) -> AbstractContextManager[Any]:
        """The role and the task that are played when this is called."""
        return self.playing(self.active_role, self._state.task)

    def _hidden_at(self, sequences: Sequences, wanted_BT: Tensor) -> Tensor:
        """Last hidden states _NH at some of the positions, of which none lies before a prompt's last token."""
        ids_BT = sequences.ids_BT.to(self.device)
        packing = Packing.of(sequences, self.device) if self.packs else None
        tasks = self._state.task if sequences.tasks_B is None else sequences.tasks_B[:, None]
        if isinstance(tasks, Tensor) and packing is not None:
            tasks = tasks[packing.row_L, 0][None]
        # A role with weights of its own shares no trunk with the others.
        shares_trunk = self.active_model is self.model
        trunk = self._trunk.one_pass(sequences, packing) if shares_trunk else nullcontext()
        with self.route(tasks), trunk:
            if packing is None:
                return self._hidden(ids_BT)[wanted_BT.to(self.device)]
            with self._recomputing():
                hidden_LH = packed_hidden(decoder_of(self.active_model), ids_BT, packing)
        return hidden_LH[packing.take(wanted_BT).to(self.device)]
