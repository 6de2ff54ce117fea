"""A finished run, as training the network that comes with d2i for no step would leave it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from d2i.models.model_dir import resolve_sizes
from d2i.recipes import load_recipe
from d2i.weights_resolve import resolve_weights


def write_demo_run(directory: Path) -> Path:
    """Write the run to a new directory, and return that."""
    directory.mkdir()
    demo = load_recipe("demo")
    sized = demo.model_copy(update={"backbone": resolve_sizes(demo.backbone)})
    recipe = json.loads(sized.model_dump_json())
    (directory / "config.json").write_text(json.dumps({"recipe": recipe}))
    weights = Path(resolve_weights("demo:backbone")) / "model.safetensors"
    shutil.copy(weights, directory / "ema.safetensors")
    return directory
