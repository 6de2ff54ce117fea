"""The networks equal the published ones: outputs, key names, shapes, parameter counts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2i.backbones import backbones, presets_of
from d2i.errors import ConfigError
from d2i.models import build_backbone
from d2i.models.blocks import timestep_embedding
from d2i.models.unidiffuser import model as unidiffuser
from d2i.models.uvit import model as uvit
from tests.golden.arrays import (
    TINY_UVIT,
    facts,
    fill_by_recipe,
    max_distance,
    recipe_input,
    tensors,
    tiny_unidiffuser,
    tiny_uvit,
)
from tests.shared import needs_shared

pytestmark = needs_shared

FP32_TOLERANCE = 2e-5
# The published time embedding is float32 even in float64 networks, and its last bit differs
# between processors; given the stored one, the float64 networks agree to 1e-10.
FP64_TOLERANCE = 1e-6
EXACT_FP64_TOLERANCE = 1e-10
OUTPUTS = ("img_out", "clip_img_out", "text_out")
# What the cases of low variance multiply by 1e-3.
SMALL_UVIT = ("pos_embed", "patch_embed", "context_embed")
SMALL_UNIDIFFUSER = (
    *("pos_embed", "patch_embed", "text_embed", "clip_img_embed", "token_embedding"),
    "in_blocks.0.attn.proj",
)


def uvit_output(network: Any, n_key: str = "n") -> Tensor:
    """Run a tiny U-ViT on the golden inputs."""
    golden = tensors("uvit_tiny")
    with torch.no_grad():
        output: Tensor = network(golden["x"], golden[n_key], golden["context"])
    return output


def unidiffuser_outputs(
    network: nn.Module, version: str, size: str = "", *, clean_text: bool = False
) -> tuple[Tensor, ...]:
    """Run a tiny UniDiffuser on the golden inputs of one latent size."""
    golden = tensors(f"unidiffuser_{version}_tiny")
    latent = golden[f"img{size}"]
    rows = slice(len(latent))
    n_text = torch.zeros_like(golden["t_text"]) if clean_text else golden["t_text"]
    data_type = golden["data_type"][rows] if version == "v1" else 1
    with torch.no_grad():
        outputs: tuple[Tensor, ...] = network(
            latent,
            golden["clip_img"][rows],
            golden["text"][rows],
            golden["t_img"][rows],
            n_text[rows],
            data_type,
        )
    return outputs


def test_time_token_matches_golden() -> None:
    golden = tensors("uvit_tiny")
    token = timestep_embedding(golden["n"], 64)
    assert token.dtype == torch.float32
    assert max_distance(token[:, 0], golden["time_embedding_64"]) < 1e-5


@pytest.mark.parametrize(("n_key", "output"), [("n", "out"), ("n_int", "out_n_int")])
def test_tiny_uvit_matches_golden(n_key: str, output: str) -> None:
    golden, network = tensors("uvit_tiny"), tiny_uvit()
    assert max_distance(uvit_output(network, n_key), golden[output]) < FP32_TOLERANCE
    found = uvit_output(network.double(), n_key)
    assert max_distance(found, golden[f"{output}_fp64"]) < FP64_TOLERANCE


@pytest.fixture
def published_time_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the networks the stored time embedding, whose last bit differs between processors."""
    golden = tensors("uvit_tiny")
    stored = dict(zip(golden["n"].tolist(), golden["time_embedding_64"], strict=True))

    def published(n_B: Tensor, dim: int) -> Tensor:
        tokens = timestep_embedding(n_B, dim)
        rows = [stored.get(n, token[0]) for n, token in zip(n_B.tolist(), tokens, strict=True)]
        return torch.stack(rows)[:, None]

    for module in (uvit, unidiffuser):
        monkeypatch.setattr(module, "timestep_embedding", published)


@pytest.mark.usefixtures("published_time_tokens")
def test_float64_uvit_matches_golden_to_1e_10() -> None:
    golden = tensors("uvit_tiny")
    found = uvit_output(tiny_uvit().double())
    assert max_distance(found, golden["out_fp64"]) < EXACT_FP64_TOLERANCE
    found = uvit_output(shrink(tiny_uvit(), SMALL_UVIT).double())
    assert max_distance(found, golden["lowvar_out_fp64"]) < EXACT_FP64_TOLERANCE


@pytest.mark.usefixtures("published_time_tokens")
@pytest.mark.parametrize("size", ["", "_12", "_4", "_16"])
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_float64_unidiffuser_matches_golden_to_1e_10(version: str, size: str) -> None:
    outputs = unidiffuser_outputs(tiny_unidiffuser(version).double(), version, size)
    check_exact(outputs, version, "{}" + f"{size}_fp64")


@pytest.mark.usefixtures("published_time_tokens")
def test_float64_unidiffuser_of_low_variance_matches_golden() -> None:
    network = shrink(tiny_unidiffuser("v1"), SMALL_UNIDIFFUSER).double()
    check_exact(unidiffuser_outputs(network, "v1"), "v1", "lowvar_{}_fp64")


def check_exact(outputs: tuple[Tensor, ...], version: str, key: str) -> None:
    """Compare the rows whose text time is among those stored, or 0, which is exact anywhere."""
    golden = tensors(f"unidiffuser_{version}_tiny")
    times = golden["t_text"][: len(outputs[0])].tolist()
    rows = [row for row, n in enumerate(times) if n in (0.0, 1000.0)]
    assert len(rows) >= 2
    for name, found in zip(OUTPUTS, outputs, strict=True):
        assert max_distance(found[rows], golden[key.format(name)][rows]) < EXACT_FP64_TOLERANCE


def test_tiny_uvit_activations_match_golden() -> None:
    golden, network = tensors("uvit_tiny"), tiny_uvit()
    names = [key.removeprefix("act.") for key in golden if key.startswith("act.")]
    seen: dict[str, Tensor] = {}
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
    uvit_output(network)
    assert len(names) == 9
    for name in names:
        assert max_distance(seen[name][:2], golden[f"act.{name}"]) < FP32_TOLERANCE, name


@pytest.mark.parametrize("size", ["", "_12", "_4", "_16"])
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_tiny_unidiffuser_at_other_latent_sizes_matches_golden(version: str, size: str) -> None:
    golden, network = tensors(f"unidiffuser_{version}_tiny"), tiny_unidiffuser(version)
    single = unidiffuser_outputs(network, version, size)
    double = unidiffuser_outputs(network.double(), version, size)
    for name, found, found_fp64 in zip(OUTPUTS, single, double, strict=True):
        assert max_distance(found, golden[f"{name}{size}"]) < FP32_TOLERANCE
        assert max_distance(found_fp64, golden[f"{name}{size}_fp64"]) < FP64_TOLERANCE


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_tiny_unidiffuser_with_clean_text_matches_golden(version: str) -> None:
    golden = tensors(f"unidiffuser_{version}_tiny")
    outputs = unidiffuser_outputs(tiny_unidiffuser(version), version, clean_text=True)
    for name, found in zip(OUTPUTS, outputs, strict=True):
        assert max_distance(found, golden[f"{name}_ttext0"]) < FP32_TOLERANCE


def test_uvit_layer_norm_epsilon_matches_golden() -> None:
    network = shrink(tiny_uvit(), SMALL_UVIT)
    golden = tensors("uvit_tiny")
    assert max_distance(uvit_output(network), golden["lowvar_out"]) < FP32_TOLERANCE
    found = uvit_output(network.double())
    assert max_distance(found, golden["lowvar_out_fp64"]) < 1e-4


def test_unidiffuser_layer_norm_epsilon_matches_golden() -> None:
    network = shrink(tiny_unidiffuser("v1"), SMALL_UNIDIFFUSER)
    outputs = unidiffuser_outputs(network, "v1")
    golden = tensors("unidiffuser_v1_tiny")
    for name, found in zip(OUTPUTS, outputs, strict=True):
        assert max_distance(found, golden[f"lowvar_{name}"]) < FP32_TOLERANCE
    outputs = unidiffuser_outputs(network.double(), "v1")
    for name, found in zip(OUTPUTS, outputs, strict=True):
        assert max_distance(found, golden[f"lowvar_{name}_fp64"]) < 1e-4


def shrink(network: nn.Module, prefixes: tuple[str, ...]) -> nn.Module:
    """Multiply the tensors whose keys start with one of the prefixes by 1e-3."""
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if key.startswith(prefixes):
                tensor.mul_(1e-3)
    return network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_matches_golden(dtype: torch.dtype) -> None:
    golden = tensors("uvit_tiny")
    with torch.autocast("cpu", dtype):
        found = uvit_output(tiny_uvit())
    check_rounded(found, golden["out_fp64"], dtype)
    for version in ("v0", "v1"):
        golden = tensors(f"unidiffuser_{version}_tiny")
        with torch.autocast("cpu", dtype):
            outputs = unidiffuser_outputs(tiny_unidiffuser(version), version)
        for name, found in zip(OUTPUTS, outputs, strict=True):
            check_rounded(found, golden[f"{name}_fp64"], dtype)


def check_rounded(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The rounding of half precision, and no more: rms below 2 % (bfloat16) or 0.3 % (float16)."""
    assert found.dtype == dtype
    share = 0.02 if dtype == torch.bfloat16 else 0.003
    assert (found.double() - expected).square().mean().sqrt() < share * expected.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["uvit-s", "unidiffuser-v1"])
def test_autocast_gradients_are_finite_and_near_float32(name: str, dtype: torch.dtype) -> None:
    exact = gradients(name)
    with torch.autocast("cpu", dtype):
        rounded = gradients(name)
    for key, gradient in exact.items():
        assert rounded[key].dtype == torch.float32
        assert (rounded[key] - gradient).norm() < 0.05 * gradient.norm() + 1e-6, key


def test_uvit_at_other_latent_sizes_keeps_shape() -> None:
    network = tiny_uvit()
    text, n = torch.zeros(2, 7, 32), torch.tensor([1, 1000])
    for size in ((4, 4), (12, 16)):
        assert network(torch.zeros(2, 4, *size), n, text).shape == (2, 4, *size)


def test_latent_size_not_multiple_of_patch_raises() -> None:
    n = torch.tensor([1])
    with pytest.raises(ConfigError, match="the latent is 8 x 9, expected multiples"):
        tiny_uvit()(torch.zeros(1, 4, 8, 9), n, torch.zeros(1, 7, 32))
    parts = torch.zeros(1, 4, 7, 8), torch.zeros(1, 1, 24), torch.zeros(1, 7, 16)
    with pytest.raises(ConfigError, match="the latent is 7 x 8, expected multiples"):
        tiny_unidiffuser("v1")(*parts, n, n)


@pytest.mark.parametrize("name", ["uvit-s", "unidiffuser-v1"])
def test_gradient_checkpointing_gives_same_gradients(name: str) -> None:
    plain, recomputed = gradients(name), gradients(name, recompute=True)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


def gradients(name: str, *, recompute: bool = False) -> dict[str, Tensor]:
    """Gradients of the mean square of a tiny network's outputs; every parameter has one."""
    is_uvit = name == "uvit-s"
    network: Any = tiny_uvit() if is_uvit else tiny_unidiffuser("v1")
    golden = tensors("uvit_tiny" if is_uvit else "unidiffuser_v1_tiny")
    keys = ("x", "n", "context") if is_uvit else ("img", "clip_img", "text", "t_img", "t_text")
    network.gradient_checkpointing = recompute
    outputs = network(*(golden[key] for key in keys))
    parts = [outputs] if is_uvit else outputs
    torch.stack([part.float().square().mean() for part in parts]).sum().backward()
    return {key: parameter.grad for key, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", [b for b in backbones() if not presets_of(b).pipeline])
def test_full_size_network_keys_shapes_and_counts_match_golden(name: str) -> None:
    golden_name = name.replace("-", "_")
    with torch.device("meta"):
        state = build_backbone(name).state_dict()
    shapes = {key: list(tensor.shape) for key, tensor in state.items()}
    assert shapes == facts("state_dict_shapes")[golden_name]
    counts = facts("full_size")["counts"][golden_name]
    assert len(state) == counts["tensors"]
    assert sum(tensor.numel() for tensor in state.values()) == counts["parameters"]


@pytest.mark.parametrize("name", ["uvit-s", "uvit-s-deep"])
def test_full_size_uvit_matches_golden(name: str) -> None:
    golden, network = full_size(name)
    latent, text = recipe_input(1, 0, (2, 4, 32, 32)), recipe_input(1, 1, (2, 77, 768))
    with torch.no_grad():
        output = network(latent, torch.tensor(golden["input"]["n"]), text)
    check_statistics(output, golden["outputs"]["out"])


@pytest.mark.soak
def test_full_size_unidiffuser_matches_golden() -> None:
    golden, network = full_size("unidiffuser-v1")
    latent, clip_image = recipe_input(1, 0, (1, 4, 64, 64)), recipe_input(1, 1, (1, 1, 512))
    times = [torch.tensor(golden["input"][key]) for key in ("t_img", "t_text")]
    with torch.no_grad():
        outputs = network(latent, clip_image, recipe_input(1, 2, (1, 77, 64)), *times)
    for name, output in zip(OUTPUTS, outputs, strict=True):
        check_statistics(output, golden["outputs"][name])


def full_size(name: str) -> tuple[dict[str, Any], nn.Module]:
    """The recorded facts of a full-size network, and the network with its seeded weights."""
    golden = next(
        model for model in facts("full_size")["models"] if model["model"] == name.replace("-", "_")
    )
    with torch.device("meta"):
        network = build_backbone(name)
    network = fill_by_recipe(network.to_empty(device="cpu"), golden["seed"])
    state = network.state_dict()
    for key, probe in golden["weight_probe"].items():
        values = state[key].flatten()
        assert values[0] == pytest.approx(probe["first"], abs=1e-7)
        assert values[-1] == pytest.approx(probe["last"], abs=1e-7)
        assert values.double().sum() == pytest.approx(probe["sum"], abs=1e-4)
    return golden, network


def check_statistics(output: Tensor, golden: dict[str, Any]) -> None:
    """Compare an output with its stored moments and 64 values of it."""
    assert list(output.shape) == golden["shape"]
    values = output.double().flatten()
    index = (torch.arange(64) * 2654435761) % values.numel()
    expected = torch.tensor(golden["slice"], dtype=torch.float64)
    assert max_distance(values[index], expected) < FP32_TOLERANCE
    assert float(values.mean()) == pytest.approx(golden["mean"], abs=FP32_TOLERANCE)
    assert float(values.std(correction=0)) == pytest.approx(golden["std"], abs=FP32_TOLERANCE)
    assert float(values.abs().max()) == pytest.approx(golden["abs_max"], abs=FP32_TOLERANCE)
    assert float(values.norm()) == pytest.approx(golden["l2"], rel=FP32_TOLERANCE)


def test_initial_weights_match_published_initialization() -> None:
    torch.manual_seed(0)
    state = build_backbone("uvit-s", **TINY_UVIT).state_dict()
    assert state["pos_embed"].std() == pytest.approx(0.02, rel=0.1)
    assert state["in_blocks.0.mlp.fc1.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert not state["in_blocks.0.mlp.fc1.bias"].any()
    assert state["final_layer.weight"].std() > 0.05


@pytest.mark.parametrize("recompute", [False, True])
def test_network_compiles_to_one_graph(recompute: bool) -> None:
    golden, network = tensors("uvit_tiny"), tiny_uvit()
    check_one_graph(network, [golden[key] for key in ("x", "n", "context")], recompute)
    golden, network = tensors("unidiffuser_v1_tiny"), tiny_unidiffuser("v1")
    keys = ("img", "clip_img", "text", "t_img", "t_text", "data_type")
    check_one_graph(network, [golden[key] for key in keys], recompute)


def check_one_graph(network: Any, inputs: list[Tensor], recompute: bool) -> None:
    """Torch traces a whole call, forward and backward, without falling back to Python."""
    network.gradient_checkpointing = recompute
    torch._dynamo.reset()
    explained = torch._dynamo.explain(network)(*inputs)
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0, explained.break_reasons
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    first, expected = (
        outputs if isinstance(outputs, Tensor) else outputs[0]
        for outputs in (compiled(*inputs), network(*inputs))
    )
    assert max_distance(first, expected.detach()) < FP32_TOLERANCE
    first.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.in_blocks.parameters())


PROGRAM_OF_A_RANK = """
import os, sys, torch
from torch.nn.parallel import DistributedDataParallel
from d2i.diffusion import noise_prediction_loss
from d2i.models.unidiffuser.objective import unidiffuser_loss
from tests.golden.arrays import TINY_UNIDIFFUSER, TINY_UVIT
from d2i.models import build_backbone

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}",
    rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
latent, text, n = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16), torch.tensor([1, 1000])
for name, sizes in (("uvit-s", TINY_UVIT | {"text_dim": 16}),
        ("unidiffuser-v0", TINY_UNIDIFFUSER), ("unidiffuser-v1", TINY_UNIDIFFUSER)):
    for recompute in (False, True):
        network = build_backbone(name, **sizes, gradient_checkpointing=recompute)
        ranked = DistributedDataParallel(network)
        # A parameter without gradient makes the second backward pass raise.
        for _ in range(2):
            if name == "uvit-s":
                loss = noise_prediction_loss(ranked, latent, text, n, torch.randn_like(latent))
            else:
                parts = (latent, torch.randn(2, 1, 24), text)
                loss = unidiffuser_loss(ranked, parts, n, n, [torch.randn_like(p) for p in parts])
            loss.mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in network.parameters()), name
print("all used")
torch.distributed.destroy_process_group()
"""


def test_two_ranks_find_no_unused_parameter(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM_OF_A_RANK, str(tmp_path / "meeting"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        printed, problems = rank.communicate(timeout=240)
        assert printed == "all used\n", problems[-3000:]
