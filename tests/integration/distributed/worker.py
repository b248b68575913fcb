"""One recipe with several overrides of its own, on every rank of a launcher; a process start is the slow part.

deepspeed … worker.py RECIPE FOLDER deepspeed=zero0 deepspeed=zero1,adapter.init=lora_ga …
"""

import sys
from pathlib import Path

from pe_rlhf.algo import logprobs
from pe_rlhf.config.load import load_recipe
from pe_rlhf.stages.pipeline import run_recipe
from pe_rlhf.system.distributed import leave_group

logprobs.CHUNK = 3  # so few that the ranks' response tokens are of different numbers of chunks
recipe_file, folder, *runs = sys.argv[1:]
for name in runs:
    recipe = load_recipe(Path(recipe_file), name.split(","))
    run_recipe(recipe, Path(folder) / name, recipe.stages)
leave_group()
