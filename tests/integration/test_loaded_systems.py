"""`d2i.load` gives the images of `d2i sample` and `d2i eval`; pipelines tell of their steps."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import d2i
from d2i.cli.sample import sample
from d2i.errors import ConfigError
from d2i.prompt_text import Role
from tests.integration.evaluations import images_by_name
from tests.integration.pipelines import (
    save_tiny_flux2_klein,
    save_tiny_sd15,
    save_tiny_unclip,
    save_tiny_z_image,
)
from tests.processes import run_d2i
from tests.runs import write_demo_run

DATA = Path(__file__).resolve().parents[1] / "made_before" / "data"
CHAT = ["look what i saw", "a big red ball on the beach at night"]
STEPS = ["sample.num_steps=2"]


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the network that comes with d2i."""
    return write_demo_run(tmp_path_factory.mktemp("runs") / "demo")


def test_loaded_run_gives_the_images_of_the_sample_command(run: Path, tmp_path: Path) -> None:
    chat, out = tmp_path / "chat.txt", tmp_path / "answers.png"
    chat.write_text("\n".join(CHAT))
    run_d2i(
        *("sample", "--run", run, "--dialog", chat, "--out", out, "--set", *STEPS),
        *("--seed", 8, "--seed", 7, "--key", "test-1-1-0"),
    )
    model = d2i.load(f"run:{run}", settings=STEPS, compute_batch_size=None)
    images = model.generate(CHAT, seed=[8, 7], key="test-1-1-0")
    with Image.open(out) as grid:
        expected = np.concatenate([pixels(image) for image in images], axis=1)
        np.testing.assert_array_equal(pixels(grid), expected)
        assert grid.info["weights"] == model.weights
        assert grid.info["compute_batch_size"] == str(model.recipe.sample.compute_batch_size)

    sample(str(run), str(chat), out=str(out), seed=[7], settings=STEPS)
    small = d2i.load(run, settings=STEPS)
    with Image.open(out) as image:
        np.testing.assert_array_equal(pixels(image), pixels(small.generate(CHAT, seed=7)))
        assert image.info["key"] == small.prompt(CHAT).key


def test_loaded_run_gives_the_images_of_an_evaluation(run: Path, tmp_path: Path) -> None:
    run_d2i(
        *("eval", "--system", f"run:{run}", "--data", DATA, "--out", tmp_path / "scores"),
        *("--save-images", "all", "--json", "--set", *STEPS),
        *("--set", "sample.compute_batch_size=8", "--set", "sample.seed=5"),
    )
    model = d2i.load(run, settings=STEPS, compute_batch_size=8)
    evaluated = images_by_name(tmp_path / "scores")
    data = d2i.Dataset(DATA, "test")
    assert len(evaluated) == len(data)
    for index in range(len(data)):
        key, context = data[index]["key"], data[index]["context"]
        expected = Image.open(io.BytesIO(evaluated[f"{key}.png"]))
        image = model.generate(context, key=key, seed=5)
        np.testing.assert_array_equal(pixels(image), pixels(expected))


PIPELINES: dict[str, Any] = {
    "sd15": (save_tiny_sd15, (4, 8, 8), "# look # a red ball"),
    # It keeps its latents as rows.
    "flux2-klein": (save_tiny_flux2_klein, (128, 4, 4), "# look # a red ball"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_tells_of_steps_is_cancelled_and_read(name: str, tmp_path: Path) -> None:
    save, shape, text = PIPELINES[name]
    save(tmp_path / "base")
    model = d2i.load(
        name,
        weights=tmp_path / "base",
        settings=["sample.precision=fp32", "image.resolution=64"],
        compute_batch_size=2,
    )
    seen: list[tuple[int, tuple[int, ...]]] = []
    images = model.generate(
        ["look", "a red ball"],
        seed=[3, 4, 5],
        num_steps=2,
        on_step=lambda step, latent: seen.append((step, tuple(latent.shape))),
    )
    assert seen == [(step, (size, *shape)) for size in (2, 1) for step in (1, 2)]

    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    with pytest.raises(StopError):
        model.generate(["look", "a red ball"], num_steps=2, on_step=stop)
    again = model.generate(["look", "a red ball"], seed=5, num_steps=2)
    np.testing.assert_array_equal(pixels(again), pixels(images[2]))
    more = model.generate(["look", "a red ball"], seed=5, num_steps=3)
    assert (pixels(more) != pixels(again)).any()

    assert model.read(["look", "a red ball"]).text == text
    read = model.read(["many words " * 400, "a red ball"])
    assert read.text.endswith("# a red ball")
    assert read.cut.startswith("# many words")


def test_stock_pipeline_takes_steps_of_a_call_or_refuses_in_one_line(tmp_path: Path) -> None:
    save_tiny_sd15(tmp_path / "sd")
    stock = d2i.load(f"diffusers:{tmp_path / 'sd'}", compute_batch_size=1)
    seen: list[int] = []
    stock.generate(CHAT, num_steps=3, on_step=lambda step, _: seen.append(step))
    assert seen == [1, 2, 3]
    read = stock.read(["many words " * 400, "a red ball"])
    assert (read.tokens, read.text[-12:]) == (75, "# a red ball")
    assert len(read.text) + len(read.cut) >= 11 * 399

    save_tiny_unclip(tmp_path / "karlo")
    karlo = d2i.load(f"unclip:{tmp_path / 'karlo'}", compute_batch_size=1)
    options: dict[str, Any]
    for options in ({"num_steps": 2}, {"guidance_scale": 2.0}, {"on_step": print}):
        with pytest.raises(ConfigError, match=rf"takes no .*; leave out {next(iter(options))}$"):
            karlo.generate(CHAT, **options)


def test_chat_is_read_in_its_template_with_what_is_cut(tmp_path: Path) -> None:
    save_tiny_z_image(tmp_path / "base")
    settings = ["sample.precision=fp32", "text.format=chat", "image.resolution=64"]
    model = d2i.load("z-image", weights=tmp_path / "base", settings=settings)
    read = model.read(["look", "a red ball"])
    assert read.text.startswith("<|im_start|>user\nlook<|im_end|>\n<|im_start|>user\na red ball")
    assert read.cut == ""
    assert model.read(CHAT, roles=["assistant", "user"]).text.startswith("<|im_start|>assistant")
    by_roles = model.generate(CHAT, key="k", roles=["user", "assistant"], num_steps=2)
    assert (pixels(by_roles) != pixels(model.generate(CHAT, key="k", num_steps=2))).any()
    prompt = model.prompt(CHAT, "k", ["user", "assistant"])
    (generation,) = model.generate_prompts([prompt], [0], num_steps=2)
    np.testing.assert_array_equal(pixels(by_roles), generation.pixels)

    read = model.read(["first words " + "and more " * 400, "a red ball"])
    assert "a red ball<|im_end|>" in read.text
    assert read.tokens <= 512
    assert read.cut.startswith("first words and more")


def test_key_decides_roles_that_are_permuted(tmp_path: Path) -> None:
    save_tiny_z_image(tmp_path / "base")
    settings = ["sample.precision=fp32", "text.format=chat", "text.roles=permuted"]
    model = d2i.load("z-image", weights=tmp_path / "base", settings=settings)
    roles: list[Role] = ["user", "assistant"]
    texts = {key: model.read(CHAT, key=key, roles=roles).text for key in "abcdef"}
    assert len(set(texts.values())) == 2
    assert texts["a"] == model.read(CHAT, key="a", roles=roles).text
