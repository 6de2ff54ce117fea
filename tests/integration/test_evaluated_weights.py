"""The EMA weights that `run:` evaluates are trained well, with the EMA rate of the recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from d2i.eval.systems import parse_system
from d2i.models import family, load_weights
from d2i.recipes import change_recipe
from d2i.run_dir import RESULT_NAMES, read_recipe
from d2i.shards import ShardReader
from d2i.train.data.batch import BatchLoader
from d2i.train.data.text_source import StoredText
from d2i.train.network import build_trained_network
from d2i.train.objective import build_objective
from tests.integration.training import train

# The paper's recipes use an EMA rate of 0.9999 over 850 to 2,500 steps; these take seconds.
NUM_STEPS = 300


@pytest.fixture(scope="module")
def run(training_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "averaged"
    changed = {
        "train__num_steps": NUM_STEPS,
        "train__ema_rate": 0.9999,
        "train__micro_batch_size": 8,
        "train__num_checkpoint_steps": 1000,
        "train__num_log_steps": 100,
        "train__num_validation_steps": 1000,
    }
    assert train(training_data, run, 1, **changed)["finished"]
    return run


def loss_of(run: Path, data: Path, weights: str | None) -> float:
    """Return the loss on fixed instances, noise and times; untrained if `weights` is None."""
    recipe = read_recipe(str(run))
    torch.manual_seed(recipe.train.seed)
    network = build_trained_network(recipe)
    if weights:
        load_weights(network, weights)
    reader = ShardReader(str(data / "valid"))
    batches = BatchLoader(reader, recipe.train, family("uvit"), StoredText)
    vae = family("uvit").vae_numbers(network)
    objective = build_objective(family("uvit"), vae, recipe.train)
    rows = np.arange(len(reader))
    with torch.inference_mode():
        loaded = [batches.read(rows, step, "test.") for step in range(40)]
        losses = [objective(network, batch.to(torch.device("cpu"))).mean() for batch in loaded]
    batches.close()
    return float(torch.stack(losses).mean())


def test_evaluated_ema_is_as_good_as_trained_weights(run: Path, training_data: Path) -> None:
    evaluated = parse_system(f"run:{run}", None, read_recipe(str(run))).backbone.weights
    initial = loss_of(run, training_data, None)
    found = {k: loss_of(run, training_data, str(run / n)) for k, n in RESULT_NAMES.items()}
    of_run = loss_of(run, training_data, evaluated)
    assert initial - found["trained"] > 0.2 * initial
    assert of_run <= 1.02 * min(found.values())
    assert initial - of_run >= 0.9 * (initial - found["trained"])
    # The three kinds of weights differ.
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("kind", RESULT_NAMES)
def test_sample_weights_setting_selects_kind_of_weights(run: Path, kind: str) -> None:
    recipe = change_recipe(read_recipe(str(run)), [f"sample.weights={kind}"])
    spec = parse_system(f"run:{run}", None, recipe)
    assert spec.backbone.weights == str(run / RESULT_NAMES[recipe.sample.weights])
