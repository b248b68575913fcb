"""What every stage is given: the recipe, its folder, and the backbone it asks for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pe_rlhf.config import DataFile, DataPart, DataSource, Recipe, SamplingConfig
from pe_rlhf.config.load import load_deepspeed_config
from pe_rlhf.config.section import Section
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.prompt_order import PromptTable
from pe_rlhf.data.row_table import Ragged, RowTable
from pe_rlhf.data.rows import MAX_BAD_SHARE, PromptRow, load_prompt_rows, note_bad_rows
from pe_rlhf.model.backbone import Backbone, FastPath
from pe_rlhf.model.device_plan import reserved_bytes
from pe_rlhf.model.loading import find_device
from pe_rlhf.optim.zero import shard_base
from pe_rlhf.rollout.by_task import RoutedRollout
from pe_rlhf.rollout.data_parallel import over_ranks
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.rollout.make import make_rollout
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.runs.metrics import MetricsWriter
from pe_rlhf.runs.saved_roles import codec_of, load_base, starting_model
from pe_rlhf.scoring.prompt_checks import prompt_check
from pe_rlhf.system.distributed import on_main, world_size
from pe_rlhf.system.progress import Advance, say
from pe_rlhf.types import Rollout
from reward.errors import InputError

C = TypeVar("C", bound=Section)
S = TypeVar("S", bound=Section)
Kept = tuple[Callable[[], PromptRow], "array[int]", tuple[str, ...]]  # a prompt's row, its ids, its other columns


@dataclass(frozen=True)
class StageContext(Generic[C]):
    """One stage of one run. `folder` is `<run_dir>/<stage>`; what is in `resources` is closed when the stage ends.

    `C` is the type of the stage's own section of the recipe, `StageContext[PPOConfig]` for example.
    """

    recipe: Recipe
    run_dir: Path
    stage: str
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def config(self) -> C:
        """The stage's own section. It is there: a stage runs only where the recipe has its section."""
        return getattr(self.recipe, self.stage)

    def section(self, name: str, kind: type[S]) -> S:
        """Another section of the recipe, which the stage needs. Raises `InputError` where the recipe has none."""
        section = getattr(self.recipe, name)
        if not isinstance(section, kind):
            raise InputError(
                f"{self.stage}: the recipe has no section {name}", kind="missing", key=name, fix=f"add a section {name}"
            )
        return section

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
        fast = FastPath(settings.packing, settings.trunk_cache_mib, settings.gradient_checkpointing)
        deepspeed = self.deepspeed or {}
        splits = deepspeed.get("zero_optimization", {}).get("stage") == 3
        # What is to be split goes to the GPUs layer by layer: there it may fit only in parts. On the CPU the weights
        # are pages of the checkpoint's files, which all ranks of a machine share.
        device = "cpu" if splits else None
        backbone = load_base(self.recipe, starting_model(self.recipe, self.run_dir), device, fast=fast)
        if splits:
            if settings.quantization != "none":
                raise InputError(
                    "backbone.quantization: ZeRO-3 cannot split a quantised base",
                    kind="conflict",
                    key="backbone.quantization",
                    fix="use deepspeed: zero2 or less",
                )
            backbone.anchor_sha256 = on_main(lambda: backbone.anchor_sha256)  # while the weights are whole
            shard_base(backbone.model, deepspeed, find_device(settings.device))
        return backbone

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """The DeepSpeed configuration of this run; None is plain AdamW, which one process can do without."""
        if self.recipe.deepspeed is None:
            return {} if world_size() > 1 else None
        return load_deepspeed_config(self.recipe.deepspeed)

    def codec(self, backbone: Backbone) -> TextCodec:
        recipe = self.recipe
        return codec_of(backbone, recipe.chat_template, recipe.chat_template_kwargs, recipe.date)

    def sampler(
        self,
        backbone: Backbone,
        role: str,
        sampling: SamplingConfig,
        prompts: Sequence[list[int]],
        on_progress: Advance | None = None,
    ) -> RolloutEngine:
        """What samples responses as the recipe asks, with room for the longest of the prompts, until the stage ends."""
        engine = over_ranks(
            self.resources.enter_context(closing(self._engine(backbone, role, sampling, prompts, on_progress)))
        )
        return RoutedRollout(engine, backbone, role) if backbone.tasks_of(role) else engine

    def sample_once(
        self, backbone: Backbone, role: str, sampling: SamplingConfig, prompts: list[list[int]], seed: int
    ) -> Rollout:
        """One rollout by an engine that is closed after it, before the roles that the stage trains are there."""
        with closing(self._engine(backbone, role, sampling, prompts)) as engine:
            engine.sync(0)
            return over_ranks(engine).generate(prompts, seed)

    def _engine(
        self,
        backbone: Backbone,
        role: str,
        sampling: SamplingConfig,
        prompts: Sequence[list[int]],
        on_progress: Advance | None = None,
    ) -> RolloutEngine:
        return make_rollout(
            backbone,
            role,
            sampling,
            self.recipe.backbone,
            folder=self.folder,
            log=self.files.vllm_log,
            longest_prompt=max(map(len, prompts)),
            on_progress=on_progress,
            reserved=reserved_bytes(self.recipe, self.stage, sampling),
        )

    def metrics(self, resume_step: int = 0) -> MetricsWriter:
        return MetricsWriter(self.files, self.recipe.tracking, self.recipe.name, resume_step)

    def prompts(
        self,
        source: DataSource,
        codec: TextCodec,
        backbone: Backbone,
        new_tokens: int,
        max_prompt_tokens: int | None = None,
        *,
        section: str | None = None,
    ) -> PromptTable:
        """The prompts of a data set, without unusable ones and those too long to leave room for a response.

        `section` is the one that names the data set; default: the stage's own.
        """
        section = section or self.stage
        room = backbone.longest_sequence - new_tokens
        if room < 1:
            raise InputError(
                f"{section}: max_new_tokens {new_tokens} leaves no room for a prompt,"
                f" {backbone.name} takes {backbone.max_positions} tokens",
                kind="too_long",
                key=f"{section}.{'rollout' if section == 'ppo' else 'sampling'}.max_new_tokens",
            )
        limit, key = min(room, max_prompt_tokens or room), f"{section}.prompts"

        shapes: dict[tuple[str, ...], tuple[str, ...]] = {}  # one object for all rows with the same columns

        ppo, settings = self.recipe.ppo, getattr(self.recipe, section)
        rewards = ppo.reward if ppo is not None and section in ("ppo", "evaluate") else ()
        check = prompt_check(rewards, getattr(settings, "judge", None))

        def encode(row: PromptRow) -> Kept:
            if not (ids := codec.encode_prompt(row.prompt)):
                raise InputError("the prompt is empty as tokens", kind="empty", key="prompt")
            check(row.prompt, row.columns)
            names = tuple(row.columns)
            return row.again, array("i", ids), shapes.setdefault(names, names)

        def fitting(pairs: list[Kept], part: DataFile, key: str) -> list[Kept]:
            kept = [row for row in pairs if len(row[1]) <= limit]
            if not kept:
                message = f"{key}: every prompt of {part.path} is longer than {limit} tokens"
                raise InputError(message, kind="too_long", key=key, file=part.path)
            if len(kept) < len(pairs):
                where = key if isinstance(part, DataPart) else section
                say(f"{where}: left out {len(pairs) - len(kept)} of {len(pairs)} prompts, longer than {limit} tokens")
            return kept

        share = getattr(settings, "max_bad_share", MAX_BAD_SHARE)
        kept, bad = load_prompt_rows(source, key, encode, share, fitting)
        note_bad_rows(self.files.left_out(key), key, bad)
        rows = RowTable(len(kept), lambda i: kept[i][0]())  # read again when a step takes them
        names = dict.fromkeys(name for _, _, names in kept for name in names)
        columns = {name: rows.map(lambda row, name=name: row.columns.get(name)) for name in names}
        return PromptTable(rows.map(lambda row: row.prompt), Ragged(ids for _, ids, _ in kept), columns)
