"""Published weights convert to model directories, diffusers' directories, and back."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2i.config import BackboneConfig
from d2i.encoders import ClipText
from d2i.errors import CheckpointError, ConfigError, D2IError
from d2i.models import build_backbone, load_weights, read_state_dict, save_weights
from d2i.models.model_dir import build_network
from d2i.models.unidiffuser.layout import from_diffusers, to_diffusers
from d2i.models.weights.convert import export_weights, import_weights
from d2i.models.weights.source import inspect_file
from d2i.weights_catalog import PUBLISHED, find_published, shapes_hash
from d2i.weights_resolve import resolve_weights
from tests.processes import run_d2i, run_process

TINY = {"latent_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "num_text_tokens": 3}
TINY_SETTINGS = [f"{key}={TINY[key]}" for key in ("latent_size", "num_heads", "num_text_tokens")]


def tiny(name: str, seed: int = 0) -> Any:
    """Build a very small network with random weights everywhere."""
    torch.manual_seed(seed)
    network = build_backbone(name, **TINY, text_dim=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return network


def random_bits(network: nn.Module) -> dict[str, Tensor]:
    """Return random float16 bits for every tensor of a network, except NaN and infinity."""
    random = np.random.default_rng(0)
    state = {}
    for key, tensor in network.state_dict().items():
        bits = random.integers(0, 2**16, tensor.shape, np.uint16)
        # An exponent of all ones is NaN or infinity.
        bits[(bits & 0x7C00) == 0x7C00] ^= 0x0400
        state[key] = torch.from_numpy(bits).view(torch.half)
    return state


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert the same keys, dtypes and bytes."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key


def diffusers_unidiffuser(directory: Path) -> Any:
    """Load the directory with diffusers."""
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel

    return UniDiffuserModel.from_pretrained(directory, low_cpu_mem_usage=False).eval()


@pytest.mark.parametrize("name", ["uvit-s", "unidiffuser-v0", "unidiffuser-v1"])
@pytest.mark.parametrize("form", ["flat", "directory", "parallel", "safetensors"])
def test_import_weights_reads_every_published_form(tmp_path: Path, name: str, form: str) -> None:
    state = tiny(name).state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_weights(state, path)
    elif form == "directory":
        path = tmp_path / "10.ckpt"
        path.mkdir()
        torch.save(state, path / "nnet_ema.pth")
        torch.save(tiny(name, 1).state_dict(), path / "nnet.pth")
    else:
        prefix = "module." if form == "parallel" else ""
        torch.save({prefix + key: tensor for key, tensor in state.items()}, path)
    import_weights(path, tmp_path / "model", TINY_SETTINGS)
    network = build_network(BackboneConfig(name=name, weights=str(tmp_path / "model")))
    assert_same_bits(network.state_dict(), state)
    export_weights(tmp_path / "model", tmp_path / "back.pth", "published")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert_same_bits(back, state)
    card = (tmp_path / "model" / "README.md").read_text()
    assert inspect_file(path)["sha256"] in card
    assert "licence" in card


@pytest.mark.parametrize("name", ["unidiffuser-v0", "unidiffuser-v1"])
def test_exported_weights_compute_same_outputs_in_diffusers(tmp_path: Path, name: str) -> None:
    network = tiny(name)
    save_weights(network, tmp_path / "w.safetensors")
    export_weights(tmp_path / "w.safetensors", tmp_path / "unet", "diffusers", TINY_SETTINGS)
    theirs = diffusers_unidiffuser(tmp_path / "unet")
    torch.manual_seed(3)
    inputs = (torch.randn(2, 4, 4, 4), torch.randn(2, 1, 512), torch.randn(2, 3, 8))
    times = torch.tensor([1, 999]), torch.tensor([0, 1000])
    data_type = torch.tensor([0, 1])
    with torch.no_grad():
        for ours, other in zip(
            network(*inputs, *times, data_type), theirs(*inputs, *times, data_type), strict=True
        ):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4 * float(other.std()))
    # And back: imported as a directory, and loaded as weights.
    import_weights(tmp_path / "unet", tmp_path / "model", TINY_SETTINGS)
    assert_same_bits(read_state_dict(tmp_path / "model"), network.state_dict())
    assert_same_bits(
        load_weights(tiny(name, 5), tmp_path / "unet").state_dict(), network.state_dict()
    )


def test_weights_saved_by_diffusers_are_loaded(tmp_path: Path) -> None:
    network = tiny("unidiffuser-v1")
    save_weights(network, tmp_path / "w.safetensors")
    export_weights(tmp_path / "w.safetensors", tmp_path / "unet", "diffusers", TINY_SETTINGS)
    diffusers_unidiffuser(tmp_path / "unet").save_pretrained(tmp_path / "theirs")
    assert_same_bits(
        load_weights(tiny("unidiffuser-v1", 5), tmp_path / "theirs").state_dict(),
        network.state_dict(),
    )


def test_import_weights_names_missing_and_unexpected_keys(tmp_path: Path) -> None:
    state = to_diffusers(tiny("unidiffuser-v1").state_dict())
    del state["transformer.transformer_out_blocks.0.block.attn1.to_k.weight"]
    state["transformer.extra.weight"] = torch.zeros(1)
    save_weights(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        import_weights(tmp_path / "w.safetensors", tmp_path / "model", TINY_SETTINGS)
    assert "1 missing (out_blocks.0.attn.qkv.weight)" in str(caught.value)
    assert "3 unexpected" in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_import_of_caption_decoder_takes_text_prefix_only(tmp_path: Path) -> None:
    prefix = {"encode_prefix.weight": torch.randn(64, 768), "encode_prefix.bias": torch.randn(64)}
    # GPT-2's state dict holds its attention masks, which are not floats.
    others = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "clip_model.logit_scale": torch.zeros(()),
    }
    content = {f"module.{key}": tensor for key, tensor in (prefix | others).items()}
    torch.save(content, tmp_path / "caption_decoder.pth")
    assert inspect_file(tmp_path / "caption_decoder.pth")["published"] == ["caption_decoder.pth"]
    import_weights(tmp_path / "caption_decoder.pth", tmp_path / "prefix")
    assert_same_bits(read_state_dict(tmp_path / "prefix"), prefix)
    with pytest.raises(ConfigError, match="only a backbone has sizes"):
        import_weights(tmp_path / "caption_decoder.pth", tmp_path / "other", ["dim=4"])


def test_export_of_run_uses_sizes_of_its_recipe(tmp_path: Path) -> None:
    run, network = tmp_path / "run", tiny("uvit-s")
    save_weights(network, run / "ema.safetensors")
    backbone = BackboneConfig(name="uvit-s", weights="elsewhere", text_dim=8, **TINY)
    (run / "config.json").write_text(json.dumps({"recipe": {"backbone": backbone.model_dump()}}))
    import_weights(run, tmp_path / "model")
    export_weights(run, tmp_path / "mine.pth", "published")
    assert_same_bits(read_state_dict(tmp_path / "mine.pth"), network.state_dict())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_heads"] == 2
    import_weights(run / "ema.safetensors", tmp_path / "again")
    assert_same_bits(read_state_dict(tmp_path / "again"), network.state_dict())


def test_config_json_of_other_program_is_ignored(tmp_path: Path) -> None:
    save_weights(tiny("uvit-s"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["Other"], "hidden_size": 16}')
    import_weights(tmp_path, tmp_path / "model", TINY_SETTINGS)
    assert build_network(BackboneConfig(name="uvit-s", weights=str(tmp_path / "model")))


def test_import_weights_requires_sizes_not_in_tensors(tmp_path: Path) -> None:
    save_weights(tiny("uvit-s"), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="do not reveal latent_size, num_heads, num_text_tokens"):
        import_weights(tmp_path / "w.safetensors", tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"mis-shaped \(pos_embed"):
        wrong = [*TINY_SETTINGS[:-1], "num_text_tokens=4"]
        import_weights(tmp_path / "w.safetensors", tmp_path / "model", wrong)
    assert not (tmp_path / "model").exists()


def test_import_weights_infers_sizes_from_number_of_positions(tmp_path: Path) -> None:
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "latent_size": 8, "num_text_tokens": 154}
    save_weights(build_backbone("uvit-s", **sizes), tmp_path / "w.safetensors")
    import_weights(tmp_path / "w.safetensors", tmp_path / "model", ["num_heads=2"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config == {"name": "uvit-s"} | sizes


def test_import_weights_keeps_unpublished_latent_scale(tmp_path: Path) -> None:
    save_weights(build_backbone("uvit-s", **TINY, latent_scale=0.5), tmp_path / "w.safetensors")
    import_weights(tmp_path / "w.safetensors", tmp_path / "model", [*TINY_SETTINGS, "text_dim=768"])
    weights = str(tmp_path / "model")
    network: Any = build_network(BackboneConfig(name="uvit-s", weights=weights))
    assert network.latent_scale == 0.5
    metadata = {"latent_scale": "a half"}
    save_file(network.state_dict(), tmp_path / "odd.safetensors", metadata)
    with pytest.raises(ConfigError, match="latent_scale is 'a half'"):
        import_weights(tmp_path / "odd.safetensors", tmp_path / "odd", TINY_SETTINGS)


def test_existing_weights_are_not_overwritten(tmp_path: Path) -> None:
    save_weights(tiny("uvit-s"), tmp_path / "w.safetensors")
    import_weights(tmp_path / "w.safetensors", tmp_path / "model", TINY_SETTINGS)
    with pytest.raises(CheckpointError, match="already holds weights"):
        import_weights(tmp_path / "w.safetensors", tmp_path / "model", TINY_SETTINGS)


def test_export_weights_rejects_unreadable_formats(tmp_path: Path) -> None:
    save_weights(tiny("uvit-s"), tmp_path / "w.safetensors")
    cases: list[tuple[Any, str, type[D2IError], str]] = [
        ("diffusers", "unet", CheckpointError, "diffusers has no such model"),
        ("published", "w.bin", ConfigError, "ends in .pth or .safetensors"),
    ]
    for layout, out, error, message in cases:
        with pytest.raises(error, match=message):
            export_weights(tmp_path / "w.safetensors", tmp_path / out, layout, TINY_SETTINGS)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"w.safetensors", "w.safetensors.sha256"}


def test_weights_catalog_matches_built_networks() -> None:
    for file in PUBLISHED:
        if file.backbone is None:
            continue
        with torch.device("meta"):
            state = build_backbone(file.backbone).state_dict()
        state = to_diffusers(state) if "diffusers" in file.holds else state
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        assert (len(shapes), shapes_hash(shapes)) == (file.num_keys, file.shapes_sha256)
        assert file in find_published(shapes)


def test_autoencoder_round_trips_through_published_layout(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    widths = [32, 32, 64, 64]
    levels = len(widths)
    theirs = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    ).eval()
    theirs.save_pretrained(tmp_path / "vae")
    export_weights(tmp_path / "vae", tmp_path / "kl.pth", "published")
    assert inspect_file(tmp_path / "kl.pth")["what"] == "KL autoencoder, LDM's layout"
    import_weights(tmp_path / "kl.pth", tmp_path / "back")
    assert_same_bits(read_state_dict(tmp_path / "back"), theirs.state_dict())
    back = AutoencoderKL.from_pretrained(tmp_path / "back", low_cpu_mem_usage=False)
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        found, expected = (net.encode(image).latent_dist.mean for net in (back, theirs))
    assert torch.equal(found, expected)
    # Backward compatibility: the key names of diffusers at the time of Stable Diffusion v1.
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {
        reduce(lambda key, name: key.replace(name, names[name]), names, key): tensor
        for key, tensor in theirs.state_dict().items()
    }
    assert len(old.keys() - theirs.state_dict().keys()) == 16
    save_weights(old, tmp_path / "old.safetensors")
    import_weights(tmp_path / "old.safetensors", tmp_path / "new")
    assert_same_bits(read_state_dict(tmp_path / "new"), theirs.state_dict())
    state = read_state_dict(tmp_path / "kl.pth")
    del state["decoder.mid.attn_1.q.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match="1 missing"):
        import_weights(tmp_path / "cut.pth", tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uvit-s", pytest.param("unidiffuser-v1", marks=pytest.mark.soak)])
def test_full_size_checkpoint_round_trips_bit_exactly(tmp_path: Path, name: str) -> None:
    with torch.device("meta"):
        state = random_bits(build_backbone(name))
    torch.save(state, tmp_path / "published.pth")
    last = import_weights(tmp_path / "published.pth", tmp_path / "model")
    assert last.found.published[0].backbone == name
    if name == "unidiffuser-v1":
        export_weights(tmp_path / "model", tmp_path / "unet", "diffusers")
        (tmp_path / "published.pth").unlink()
        assert inspect_file(tmp_path / "unet")["published"] == ["unet/diffusion_pytorch_model"]
        last = import_weights(tmp_path / "unet", tmp_path / "again")
    found = from_diffusers(dict(last.state)) if name == "unidiffuser-v1" else dict(last.state)
    assert_same_bits(found, state)
    assert_same_bits(read_state_dict(tmp_path / ("again" if "uni" in name else "model")), state)
    (tmp_path / "model" / "model.safetensors").unlink()


def test_weights_commands_list_inspect_and_import(tmp_path: Path) -> None:
    listed = run_d2i("weights", "list", "--json")["files"]
    assert {file["name"] for file in listed} >= {"mscoco_uvit_small.pth", "caption_decoder.pth"}
    assert all(file["licence"] and file["source"] for file in listed)
    inspected = run_d2i("weights", "inspect", "demo:backbone", "--json")
    assert (inspected["kind"], inspected["num_tensors"], inspected["published"]) == (
        "backbone",
        94,
        [],
    )
    done = run_d2i("weights", "import", "demo:backbone", "--out", tmp_path / "model", "--json")
    assert done["sha256"] == inspected["sha256"]
    assert inspect_file(tmp_path / "model")["shapes"] == inspected["shapes"]


def test_import_and_export_weights_accept_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network = tiny("uvit-s")
    source = f"memory:/{tmp_path}/w.safetensors"
    save_weights(network, source)
    copy = resolve_weights(source)
    import_weights(Path(copy), f"memory:/{tmp_path}/model", TINY_SETTINGS)
    with pytest.raises(CheckpointError, match="already holds weights"):
        import_weights(Path(copy), f"memory:/{tmp_path}/model", TINY_SETTINGS)
    again = build_network(BackboneConfig(name="uvit-s", weights=f"memory:/{tmp_path}/model"))
    assert_same_bits(again.state_dict(), network.state_dict())
    save_weights(network, tmp_path / "w.safetensors")
    settings = [part for setting in TINY_SETTINGS for part in ("--set", setting)]
    url, out = f"file://{tmp_path}/w.safetensors", f"file://{tmp_path}/out.pth"
    done = run_d2i("weights", "export", url, "--to", "published", "--out", out, *settings, "--json")
    assert done["out"] == out
    assert_same_bits(read_state_dict(tmp_path / "out.pth"), network.state_dict())


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.zeros(()), torch.zeros(4)),
        (torch.zeros(4), torch.zeros(4)),
        (torch.zeros(4, 8), torch.zeros(8)),
        (torch.zeros(0, 8), torch.zeros(0)),
        (torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4)),
    ],
)
def test_malformed_text_prefix_is_rejected(tmp_path: Path, weight: Tensor, bias: Tensor) -> None:
    path = tmp_path / "caption_decoder.pth"
    torch.save({"encode_prefix.weight": weight, "encode_prefix.bias": bias}, path)
    with pytest.raises(CheckpointError, match=r"expected encode_prefix.weight \(out, in\)"):
        import_weights(path, tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()
    with pytest.raises(CheckpointError, match=r"expected encode_prefix.weight \(out, in\)"):
        ClipText("demo:clip_text", str(path))


def test_unsupported_autoencoder_is_one_line_error(tmp_path: Path) -> None:
    whole = {
        "encoder.down.0.block.0.conv1.weight": torch.zeros(8, 8, 3, 3),
        "encoder.down.0.block.0.conv2.weight": torch.zeros(8, 8, 3, 3),
        "encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
        "decoder.conv_out.weight": torch.zeros(3, 8, 3, 3),
        "post_quant_conv.weight": torch.zeros(4, 4, 1, 1),
    }
    for state, message in (
        (whole | {"encoder.conv_in.weight": torch.zeros(())}, "without 'encoder.conv_in.weight'"),
        (whole, "multiples of 32"),
    ):
        save_weights(state, tmp_path / "kl.safetensors")
        with pytest.raises(CheckpointError, match=message):
            import_weights(tmp_path / "kl.safetensors", tmp_path / "vae")
        assert not (tmp_path / "vae").exists()


def test_inspect_file_names_encoders_that_need_no_import(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    save_weights(AutoencoderTiny(), tmp_path / "tiny.safetensors")
    for name, words in (
        (str(tmp_path / "tiny.safetensors"), "tiny autoencoder (AutoencoderTiny)"),
        ("demo:clip_image", "CLIP's image encoder"),
        ("demo:clip_text", "CLIP's text encoder"),
    ):
        path = Path(resolve_weights(name))
        inspected = inspect_file(path)
        assert (inspected["kind"], inspected["what"]) == ("encoder", words)
        with pytest.raises(CheckpointError, match="use it directly"):
            import_weights(path, tmp_path / "out")
        with pytest.raises(CheckpointError, match="use it directly"):
            export_weights(path, tmp_path / "out.pth", "published")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"tiny.safetensors", "tiny.safetensors.sha256"}


def test_invalid_weights_file_is_one_line_error_and_exit_code_2(tmp_path: Path) -> None:
    names = ("lfs.pth", "cut.pth", "uvit_v1.pth", "code.pth")
    pointer, cut, renamed, code = (tmp_path / name for name in names)
    torch.save({"norm.weight": Path("a path is an object")}, code)
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    save_weights(tiny("uvit-s"), renamed)
    cut.write_bytes(renamed.read_bytes()[:1000])
    for path, message in (
        (pointer, "Git LFS pointer"),
        (cut, "truncated"),
        (code, "holds more than tensors"),
        (renamed, "is U-ViT, text to image"),
    ):
        with pytest.raises(D2IError, match=message):
            import_weights(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    done = run_process("weights", "export", renamed, "--to", "diffusers", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "diffusers has no such model" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
