"""The recipe schema: one strict model per stage, a file each.

Every key of every recipe is here with its meaning; an unknown key is an error that names the nearest one. What can be
wrong between keys is checked here too, before a model or a data set is touched.
"""

from pe_rlhf.config.adapter import AdapterConfig, LoRAConfig, LowRankConfig
from pe_rlhf.config.compare import CollapseConfig, CompareConfig
from pe_rlhf.config.continual import ContinualConfig
from pe_rlhf.config.evaluate import EvaluateConfig
from pe_rlhf.config.model import BackboneConfig
from pe_rlhf.config.optimizer import OptimizerConfig, RewardOptimizerConfig
from pe_rlhf.config.ppo import KLConfig, PPOConfig
from pe_rlhf.config.preferences import PreferencesConfig
from pe_rlhf.config.recipe import STAGES, Recipe, TrackingConfig
from pe_rlhf.config.reward import RewardConfig
from pe_rlhf.config.reward_source import RewardSource
from pe_rlhf.config.sampling import RolloutConfig, SamplerConfig, SamplingConfig
from pe_rlhf.config.section import DataFile, DataPart, DataSource, Section
from pe_rlhf.config.sft import SFTConfig, SFTOptimizerConfig
from pe_rlhf.config.tasks import TASK_STAGES, TaskConfig

__all__ = [
    "STAGES",
    "TASK_STAGES",
    "AdapterConfig",
    "BackboneConfig",
    "CollapseConfig",
    "CompareConfig",
    "ContinualConfig",
    "DataFile",
    "DataPart",
    "DataSource",
    "EvaluateConfig",
    "KLConfig",
    "LoRAConfig",
    "LowRankConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PreferencesConfig",
    "Recipe",
    "RewardConfig",
    "RewardOptimizerConfig",
    "RewardSource",
    "RolloutConfig",
    "SFTConfig",
    "SFTOptimizerConfig",
    "SamplerConfig",
    "SamplingConfig",
    "Section",
    "TaskConfig",
    "TrackingConfig",
]
