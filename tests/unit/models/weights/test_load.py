"""Weights load from every published file format, or fail with a one-line error."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor, nn

from d2i.errors import CheckpointError, ConfigError
from d2i.models import build_backbone, load_weights, read_state_dict, save_weights
from d2i.models.unidiffuser.layout import UNUSED_PREFIX, to_diffusers
from d2i.models.weights.load import read_described

TINY = {
    "latent_size": 4,
    "dim": 16,
    "depth": 2,
    "num_heads": 2,
    "text_dim": 8,
    "num_text_tokens": 3,
}


def tiny(seed: int = 0) -> nn.Module:
    """Build a very small U-ViT."""
    torch.manual_seed(seed)
    return build_backbone("uvit-s", **TINY)


def assert_equal(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Assert that every tensor of the network equals the one of the state dict."""
    found = network.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def rejection_message(network: nn.Module, path: Path) -> str:
    """Return the one-line error of a rejected file; assert that the network is unchanged."""
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, path)
    assert_equal(network, before)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in tiny(1).state_dict().items()}


def test_safetensors_round_trip(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_weights(tiny(1), tmp_path / "a.safetensors")
    save_weights(state, str(tmp_path / "b.safetensors"))
    network = tiny()
    assert load_weights(network, tmp_path / "a.safetensors") is network
    assert_equal(network, state)
    assert_equal(load_weights(tiny(), str(tmp_path / "b.safetensors")), state)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["arch"] == "uvit"
        assert float(file.metadata()["latent_scale"]) == 0.2301
    saved_names = ["a.safetensors", "b.safetensors"]
    checksums = [f"{name}.sha256" for name in saved_names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(saved_names + checksums)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_flat_pth_is_loaded(
    tmp_path: Path, state: dict[str, Tensor], prefix: str, zipped: bool
) -> None:
    content = {prefix + key: tensor for key, tensor in state.items()}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert_equal(load_weights(tiny(), tmp_path / "w.pth"), state)


def test_checkpoint_directory_prefers_ema(tmp_path: Path, state: dict[str, Tensor]) -> None:
    directory = tmp_path / "1000.ckpt"
    directory.mkdir()
    torch.save(1000, directory / "step.pth")
    torch.save(tiny(2).state_dict(), directory / "nnet.pth")
    assert_equal(load_weights(tiny(), directory), tiny(2).state_dict())
    torch.save(state, directory / "nnet_ema.pth")
    assert_equal(load_weights(tiny(), directory), state)


def test_network_on_meta_device_takes_tensors_of_file(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    save_weights(state, tmp_path / "w.safetensors")
    with torch.device("meta"):
        network = tiny()
    assert_equal(load_weights(network, tmp_path / "w.safetensors"), state)
    assert all(parameter.requires_grad for parameter in network.parameters())
    outputs = network(torch.zeros(1, 4, 4, 4), torch.tensor([5]), torch.zeros(1, 3, 8))
    assert outputs.isfinite().all()


def test_load_weights_casts_to_dtype_of_network(tmp_path: Path, state: dict[str, Tensor]) -> None:
    half = {key: tensor.half() for key, tensor in state.items()}
    save_weights(half, tmp_path / "w.safetensors")
    network = load_weights(tiny(), tmp_path / "w.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_every_kind_of_mismatch_is_one_line_error(tmp_path: Path, state: dict[str, Tensor]) -> None:
    del state["norm.weight"], state["norm.bias"]
    state["text_embed.weight"] = torch.zeros(2)
    state["pos_embed"] = torch.zeros(1, 9, 16)
    save_weights(state, tmp_path / "w.safetensors")
    message = rejection_message(tiny(), tmp_path / "w.safetensors")
    assert "2 missing (norm.weight, norm.bias)" in message
    assert "1 unexpected (text_embed.weight)" in message
    assert "1 mis-shaped (pos_embed is (1, 9, 16), expected (1, 8, 16))" in message


def test_long_list_of_mismatches_is_truncated(tmp_path: Path) -> None:
    save_weights({"other": torch.zeros(1)}, tmp_path / "w.safetensors")
    message = rejection_message(tiny(), tmp_path / "w.safetensors")
    assert f"{len(tiny().state_dict())} missing" in message
    assert "..." in message
    assert len(message) < 400


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.999])
def test_truncated_weights_file_is_rejected(
    tmp_path: Path, state: dict[str, Tensor], form: str, fraction: float
) -> None:
    path = tmp_path / "w.bin"
    if form == "safetensors":
        save_weights(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    os.truncate(path, int(fraction * path.stat().st_size))
    assert "truncated" in rejection_message(tiny(), path)


def test_git_lfs_pointer_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "Git LFS pointer" in rejection_message(tiny(), path)


@pytest.mark.parametrize("head", ["<!DOCTYPE html><html>", "\n<html lang=en>"])
def test_html_page_instead_of_weights_is_rejected(tmp_path: Path, head: str) -> None:
    path = tmp_path / "mscoco_uvit_small.pth"
    path.write_text(f"{head}<title>Virus scan warning</title>")
    assert "is a web page, not the weights" in rejection_message(tiny(), path)


class Payload:
    """Runs a command when unpickled without a pickle guard."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Return the command to run."""
        return os.system, ("touch should-not-exist",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickle_guard_never_runs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if form == "plain":
        path.write_bytes(pickle.dumps({"norm.weight": Payload()}, protocol=2))
    else:
        content = {"norm.weight": Payload()}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert "pickle that holds more than tensors" in rejection_message(tiny(), path)
    assert not (tmp_path / "should-not-exist").exists()


class MemoryBomb:
    """Allocates much memory when unpickled, by a call that torch allows."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        """Return the call that allocates it."""
        return bytearray, (1 << 40,)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_pickle_guard_limits_memory(tmp_path: Path, form: str) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": MemoryBomb()}, path, _use_new_zipfile_serialization=form == "zip")
    assert "holds more than tensors" in rejection_message(tiny(), path)
    torch.save({"a": "b" * 5_000_000}, path, _use_new_zipfile_serialization=form == "zip")
    assert "over 4000000 bytes besides its tensors" in rejection_message(tiny(), path)


def test_compressed_pth_is_rejected(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "is compressed" in rejection_message(tiny(), tmp_path / "w.pth")


def test_expanded_and_meta_tensors_are_rejected(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    torch.save(state | {"norm.bias": torch.zeros(1).expand(16)}, path)
    assert "a tensor without its numbers at 'norm.bias'" in rejection_message(tiny(), path)
    torch.save(state | {"norm.bias": torch.zeros(16, device="meta")}, path)
    assert "holds more than tensors" in rejection_message(tiny(), path)


def test_two_networks_in_one_file_are_rejected(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state | {"module.norm.bias": torch.zeros(16)}, tmp_path / "w.pth")
    message = rejection_message(tiny(), tmp_path / "w.pth")
    assert "holds both norm.bias and module.norm.bias" in message


def test_control_characters_in_key_are_escaped_in_error(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    torch.save(state | {"a\nb\x1b[31m": torch.zeros(1)}, tmp_path / "w.pth")
    assert r"at 'a\nb\x1b[31m'" in rejection_message(tiny(), tmp_path / "w.pth")


@pytest.mark.parametrize("layout", ["published", "diffusers"])
@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 0, 4, 5)])
def test_wrong_tensor_shape_is_one_line_error(
    tmp_path: Path, layout: str, shape: tuple[int, ...]
) -> None:
    network = build_backbone("unidiffuser-v1", **TINY) if layout == "diffusers" else tiny()
    state = dict(network.state_dict())
    state = to_diffusers(state) if layout == "diffusers" else state
    path = tmp_path / "w.safetensors"
    for key in state:
        if key.startswith(UNUSED_PREFIX):
            continue
        save_weights(state | {key: torch.zeros(shape)}, path)
        with pytest.raises(CheckpointError, match=r"mis-shaped|missing") as caught:
            load_weights(network, path)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content", [{}, 1000, [torch.zeros(1)], {"model": {"a": torch.zeros(1)}}, {"step": 5}]
)
def test_pth_without_flat_state_dict_is_rejected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert "expected a flat state dict" in rejection_message(tiny(), tmp_path / "w.pth")


def test_integer_weights_are_rejected(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state | {"pos_embed": torch.zeros(1, 8, 16, dtype=torch.int64)}, tmp_path / "w.pth")
    assert "torch.int64" in rejection_message(tiny(), tmp_path / "w.pth")


def test_missing_or_unwritable_weights_path_raises(tmp_path: Path) -> None:
    assert "No such file" in rejection_message(tiny(), tmp_path / "none.pth")
    (tmp_path / "empty.ckpt").mkdir()
    assert "holds no weights" in rejection_message(tiny(), tmp_path / "empty.ckpt")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        save_weights(tiny(), tmp_path / "file" / "w.safetensors")


def test_failed_save_weights_leaves_old_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(state, path)
    program = (
        "import resource, signal, sys, torch; from d2i.errors import CheckpointError\n"
        "from d2i.models import save_weights\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: save_weights({'a': torch.zeros(9999)}, sys.argv[1])\n"
        "except CheckpointError as error: print(error)\n"
    )
    stdout_text = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert "cannot write" in stdout_text
    assert read_state_dict(path).keys() == state.keys()
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"w.safetensors", "w.safetensors.sha256"}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("uvit-l", {}, "did you mean 'uvit-s'"),
        ("unidifuser-v1", {}, "did you mean 'unidiffuser-v1'"),
        ("uvit-s", {"heads": 2}, "did you mean 'num_heads'"),
        ("uvit-s", {"clip_dim": 2}, "unknown override of uvit-s"),
        ("uvit-s", {"num_heads": 5}, "dim 512 is not a multiple of num_heads 5"),
        ("uvit-s", {"latent_size": 33}, "latent_size 33 is not a multiple of patch_size 2"),
        ("uvit-s", {"dim": 0}, "dim is 0"),
        ("uvit-s", {"depth": 2.0}, "depth is 2.0"),
        ("uvit-s", {"dim": 15, "num_heads": 3}, "dim 15 is odd"),
    ],
)
def test_build_backbone_rejects_unknown_names_and_sizes(
    name: str, overrides: dict[str, Any], message: str
) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        build_backbone(name, **overrides)
    assert message in str(caught.value)


def test_latent_scale_is_not_in_state_dict() -> None:
    assert build_backbone("uvit-s", **TINY).latent_scale == 0.2301
    network = build_backbone("uvit-s", **TINY, latent_scale=1.0)
    assert network.latent_scale == 1.0
    assert not any("scale" in key for key in network.state_dict())


def test_saved_weights_have_default_permissions(tmp_path: Path) -> None:
    plain, saved = tmp_path / "plain", tmp_path / "saved.safetensors"
    plain.touch()
    save_weights({"a": torch.zeros(2)}, saved)
    assert saved.stat().st_mode == plain.stat().st_mode


def test_equal_weights_are_saved_as_equal_bytes(tmp_path: Path) -> None:
    """Also from different processes, whose hash maps have another order."""
    program = (
        "import sys, torch\nfrom d2i.models import save_weights\n"
        "save_weights({'ä': torch.ones(2)}, sys.argv[1], {n: n for n in 'abcdefgh'})\n"
    )
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for file in files:
        subprocess.run([sys.executable, "-c", program, str(file)], check=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_described(files[0])["h"] == "h"
    assert torch.equal(read_state_dict(files[0])["ä"], torch.ones(2))
