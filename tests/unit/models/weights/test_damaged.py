"""Weights saved by wrappers of torch are read; non-finite weights are rejected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2i.cli.weights import import_weights, inspect_weights
from d2i.config import EncodersConfig
from d2i.encoders import load_encoders
from d2i.errors import CheckpointError
from d2i.models import load_weights
from d2i.models.model_dir import build_network
from d2i.models.weights.load import read_state_dict
from d2i.recipes import load_recipe
from d2i.weights_resolve import resolve_weights


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return read_state_dict(resolve_weights("demo:backbone"))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_torch_wrappers_are_stripped(
    tmp_path: Path, state: dict[str, Tensor], prefix: str
) -> None:
    path = tmp_path / "wrapped.pth"
    torch.save({prefix + key: value for key, value in state.items()}, path)
    found = read_state_dict(path)
    assert list(found) == list(state)
    # Compiled block by block, as d2i train does.
    torch.save({k.replace(".attn.", "._orig_mod.attn."): v for k, v in state.items()}, path)
    assert list(read_state_dict(path)) == list(state)
    key = next(iter(state))
    torch.save({key: state[key], prefix + key: state[key]}, path)
    with pytest.raises(CheckpointError, match=r"holds both .* expected one network"):
        read_state_dict(path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights_are_counted_and_rejected(
    tmp_path: Path, state: dict[str, Tensor], value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "nan.pth", tmp_path / "model"
    key = next(key for key, tensor in state.items() if tensor.ndim == 2)
    torch.save(state | {key: state[key].index_fill(1, torch.tensor(0), value)}, path)
    count = state[key].shape[0]
    inspect_weights(str(path))
    assert (
        f"warning: {count} values are NaN or infinite, the first in {key}"
        in capsys.readouterr().out
    )
    inspect_weights(str(path), as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["not_finite"] == {key: count}
    message = f"holds {count} weights that are NaN or infinite, the first in {key}"
    with pytest.raises(CheckpointError, match=message):
        import_weights(str(path), str(out), settings=["num_heads=4"])
    assert not out.exists()
    with pytest.raises(CheckpointError, match=message):
        load_weights(build_network(load_recipe("demo").backbone), path)


@pytest.mark.parametrize("name", ["vae", "clip_image", "clip_text"])
def test_encoder_with_missing_weight_raises(tmp_path: Path, name: str) -> None:
    # diffusers and transformers would fill it with random numbers.
    shutil.copytree(resolve_weights(f"demo:{name}"), tmp_path / name)
    (file,) = (tmp_path / name).glob("*.safetensors")
    for checksum in (tmp_path / name).glob("*.sha256"):
        checksum.unlink()
    state = load_file(file)
    lost = next(key for key in state if key.endswith(".weight"))
    save_file({key: state[key] for key in state if key != lost}, file, metadata={"format": "pt"})
    encoders = {part: f"demo:{part}" for part in ("vae", "clip_image", "clip_text")}
    config = EncodersConfig.model_validate(encoders | {name: str(tmp_path / name)})
    with pytest.raises(CheckpointError, match=rf"1 weights of \w+ are missing, such as {lost}"):
        load_encoders(config)
