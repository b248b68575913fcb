"""One recipe under several DeepSpeed configurations, on every rank of a launcher; a process start is the slow part.

deepspeed … worker.py RECIPE FOLDER zero0 zero1 …
"""

import sys
from pathlib import Path

from pe_rlhf.recipes import load_recipe
from pe_rlhf.stages.run import run_recipe

recipe_file, folder, *configurations = sys.argv[1:]
for name in configurations:
    recipe = load_recipe(Path(recipe_file), [f"deepspeed={name}"])
    run_recipe(recipe, Path(folder) / name, recipe.stages, resume=False, restart=False)
