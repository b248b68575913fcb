"""What every stage is given: the recipe, its folder, and the backbone it asks for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pe_rlhf.config import DataSource, Recipe, SamplingConfig
from pe_rlhf.config.load import load_deepspeed_config
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.rows import load_prompts
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.optim.zero import shard_base
from pe_rlhf.rollout.data_parallel import over_ranks
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.rollout.make import make_rollout
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.runs.metrics import MetricsWriter
from pe_rlhf.runs.saved_roles import codec_of, load_base, starting_model
from pe_rlhf.system.distributed import world_size
from pe_rlhf.system.progress import say
from reward.errors import InputError
from reward.records import Prompt


@dataclass(frozen=True)
class StageContext:
    """One stage of one run. `folder` is `<run_dir>/<stage>`; what is in `resources` is closed when the stage ends."""

    recipe: Recipe
    run_dir: Path
    stage: str
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def folder(self) -> Path:
        return self.run_dir / self.stage

    @property
    def files(self) -> StageFiles:
        """The paths of this stage's files."""
        return StageFiles(self.folder)

    def backbone(self) -> Backbone:
        """The model that the stages start from, loaded fresh: they hand over through folders, never through memory."""
        settings = self.recipe.backbone
        backbone = load_base(self.recipe, starting_model(self.recipe, self.run_dir))
        backbone.trunk_cache_mib = settings.trunk_cache_mib
        backbone.packing = settings.packing
        if settings.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        if (deepspeed := self.deepspeed) is not None and deepspeed.get("zero_optimization", {}).get("stage") == 3:
            if settings.quantization != "none":
                raise InputError("backbone.quantization: ZeRO-3 cannot split a quantised base; use zero2 or less")
            _ = backbone.anchor_sha256  # while the weights are whole
            shard_base(backbone.model, deepspeed)
        return backbone

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """The DeepSpeed configuration of this run; None is plain AdamW, which one process can do without."""
        if self.recipe.deepspeed is None:
            return {} if world_size() > 1 else None
        return load_deepspeed_config(self.recipe.deepspeed)

    def codec(self, backbone: Backbone) -> TextCodec:
        return codec_of(backbone, self.recipe.chat_template)

    def rollout(
        self,
        backbone: Backbone,
        role: str,
        sampling: SamplingConfig,
        prompts: list[list[int]],
        on_progress: Callable[[int], None] | None = None,
    ) -> RolloutEngine:
        """The engine that the recipe asks for, with room for the longest of the prompts, until the stage ends."""
        engine = make_rollout(
            backbone,
            role,
            sampling,
            self.recipe.backbone,
            folder=self.folder,
            log=self.files.vllm_log,
            longest_prompt=max(map(len, prompts)),
            on_progress=on_progress,
        )
        self.resources.callback(engine.close)
        return over_ranks(engine)

    def metrics(self, resume_step: int = 0) -> MetricsWriter:
        return MetricsWriter(self.files, self.recipe.tracking, self.recipe.name, resume_step)

    def prompts(
        self,
        source: DataSource,
        codec: TextCodec,
        backbone: Backbone,
        new_tokens: int,
        max_prompt_tokens: int | None = None,
    ) -> tuple[list[Prompt], list[list[int]]]:
        """The prompts of a data set and their token ids, but for those too long to leave room for a response."""
        room = (backbone.max_positions or 10**9) - new_tokens
        if room < 1:
            raise InputError(
                f"{self.stage}: max_new_tokens {new_tokens} leaves no room for a prompt,"
                f" {backbone.name} takes {backbone.max_positions} tokens"
            )
        limit = min(room, max_prompt_tokens or room)
        pairs = [(p, codec.encode_prompt(p)) for p in load_prompts(source, f"{self.stage}.prompts")]
        kept = [(prompt, ids) for prompt, ids in pairs if 0 < len(ids) <= limit]
        if not kept:
            raise InputError(f"{self.stage}.prompts: every prompt of {source.path} is longer than {limit} tokens")
        if len(kept) < len(pairs):
            say(f"{self.stage}: left out {len(pairs) - len(kept)} of {len(pairs)} prompts, longer than {limit} tokens")
        return [prompt for prompt, _ in kept], [ids for _, ids in kept]
