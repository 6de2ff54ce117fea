"""A loaded model: what it reads, what it refuses, and that a call leaves nothing behind."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import d2i
from d2i.dialog import Turn
from d2i.errors import D2IError, DataError, GenerationError
from d2i.eval.loaded_model import Model
from d2i.eval.prompts import Prompt
from d2i.tokenize import clean, encode, split_at_window

CHAT = ["look what i saw", "a big red ball on the beach at night"]


@pytest.fixture(scope="module")
def model() -> Model:
    return d2i.load("uvit-s", weights="demo:backbone", settings=["sample.num_steps=3"])


def pixels(image: Any) -> Any:
    return np.asarray(image)


def test_an_image_is_the_same_alone_and_among_others(model: Model) -> None:
    alone = model.generate(CHAT, seed=7)
    assert (alone.size, alone.mode) == ((64, 64), "RGB")
    together = model.generate(CHAT, seed=[5, 6, 7, 8, 9, 7])
    assert len(together) == 6
    for index in (2, 5):
        np.testing.assert_array_equal(pixels(together[index]), pixels(alone))
    assert (pixels(together[0]) != pixels(alone)).any()


def test_prompts_of_several_dialogs_share_a_batch(model: Model) -> None:
    one, two = model.prompt(CHAT), model.prompt(["a green tent"], key="k")
    first, second = model.generate_prompts([one, two], [1, 2])
    np.testing.assert_array_equal(first.pixels, pixels(model.generate(CHAT, seed=1)))
    np.testing.assert_array_equal(
        second.pixels, pixels(model.generate(["a green tent"], seed=2, key="k"))
    )


def test_turns_and_their_texts_are_the_same_dialog(model: Model) -> None:
    turns = [Turn(3, CHAT[0]), Turn(8, CHAT[1])]
    assert model.prompt(turns).text == model.prompt(CHAT).text
    assert model.prompt(CHAT).key == model.prompt(CHAT).text == "# " + " # ".join(CHAT)


def test_options_of_a_call_hold_for_it_alone(model: Model) -> None:
    before = pixels(model.generate(CHAT))
    for options in ({"num_steps": 2}, {"guidance_scale": 5}, {"key": "another"}):
        assert (pixels(model.generate(CHAT, **options)) != before).any()
    of_numpy: dict[str, Any] = {"num_steps": np.int64(3), "seed": np.int32(0)}
    same = model.generate(CHAT, guidance_scale=2.0, **of_numpy)
    np.testing.assert_array_equal(pixels(same), before)


def test_on_step_sees_each_step_of_each_batch(model: Model) -> None:
    seen: list[tuple[int, tuple[int, ...], torch.dtype]] = []
    model.generate(
        CHAT,
        seed=range(5),
        num_steps=2,
        on_step=lambda step, latent: seen.append((step, tuple(latent.shape), latent.dtype)),
    )
    batches = [(number, (size, 4, 16, 16), torch.float32) for size in (4, 1) for number in (1, 2)]
    assert seen == batches


@pytest.mark.parametrize(
    ("sampler", "num_calls"),
    [
        ("dpm_solver", 3),
        ("diffusers:DDIMScheduler", 3),
        # Two evaluations a step, but for the last.
        ("diffusers:HeunDiscreteScheduler", 5),
        pytest.param("ancestral", 1000, marks=pytest.mark.soak),
    ],
)
def test_every_sampler_predicts_clean_latents_that_end_in_the_image(
    sampler: str, num_calls: int
) -> None:
    steps = 1000 if sampler == "ancestral" else 3
    settings = [f"sample.sampler={sampler}", f"sample.num_steps={steps}"]
    loaded = d2i.load("uvit-s", weights="demo:backbone", settings=settings, compute_batch_size=1)
    seen: list[torch.Tensor] = []
    watched = loaded.generate(CHAT, on_step=lambda _, latent: seen.append(latent))
    np.testing.assert_array_equal(pixels(watched), pixels(loaded.generate(CHAT)))
    assert len(seen) == num_calls
    # Noise at the start would be far away: predictions approach the last one.
    distances = [float((latent - seen[-1]).square().mean()) for latent in seen]
    assert distances[0] > distances[-2] > 0


class StopError(Exception):
    pass


def test_an_exception_of_on_step_cancels_and_leaves_the_model_usable(model: Model) -> None:
    before, calls = pixels(model.generate(CHAT)), []
    num_threads = torch.get_num_threads()

    def stop(step: int, latent: torch.Tensor) -> None:
        del latent
        calls.append(step)
        if step == 2:
            raise StopError

    with pytest.raises(StopError):
        model.generate(CHAT, seed=[1, 2, 3, 4, 5], on_step=stop)
    assert calls == [1, 2]
    assert torch.get_num_threads() == num_threads
    np.testing.assert_array_equal(pixels(model.generate(CHAT)), before)


def test_models_of_several_threads_leave_the_number_of_threads(model: Model) -> None:
    """One begins while another computes, as in a server of several systems."""
    num_threads, expected = torch.get_num_threads(), pixels(model.generate(CHAT))
    begun = threading.Barrier(2)

    def generate(one: Model) -> tuple[Image.Image, int, int]:
        before = torch.get_num_threads()
        begun.wait(30)
        image = one.generate(CHAT)
        return image, before, torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(generate, [model, d2i.load("uvit-s", weights="demo:backbone")]))
        assert all(before == after for _, before, after in found)
        assert pool.submit(torch.get_num_threads).result() == num_threads
    assert torch.get_num_threads() == num_threads
    np.testing.assert_array_equal(pixels(found[0][0]), expected)


def test_read_tells_text_tokens_and_what_is_cut(model: Model) -> None:
    assert model.read(CHAT) == d2i.Read("# " + " # ".join(CHAT), 15, "")
    read = model.read(["The incomprehensible STORY, " * 30, "a red ball"])
    assert read.tokens == 75
    assert read.text.endswith("story, # a red ball")
    assert read.cut.startswith("# the incomprehensible story,")


@pytest.mark.parametrize(
    ("setting", "text", "cut"),
    [
        ("text.cut=turn", "# a red ball", "# " + "many words " * 49 + "many words"),
        ("text.max_turns=1", "# a red ball", "# " + "many words " * 49 + "many words"),
        ("text.keep=start", "# " + "many words " * 36 + "many words", None),
    ],
)
def test_read_follows_the_settings_of_text(setting: str, text: str, cut: str | None) -> None:
    loaded = d2i.load("uvit-s", weights="demo:backbone", settings=[setting])
    read = loaded.read(["many words " * 50, "a red ball"])
    assert read.text == text
    assert read.cut == cut if cut else read.cut.endswith("# a red ball")
    assert read.tokens == len(encode(read.text))


@pytest.mark.parametrize("keep", ["end", "start"])
@pytest.mark.parametrize("num_windows", [1, 2])
def test_window_splits_a_text_and_loses_nothing(keep: Any, num_windows: int) -> None:
    words = (
        "the incomprehensibilities don't tiếng Việt 🎉🎉 xylophonist's naïveté 日本語 &amp; 10000 "
    )
    for repeats in (1, 3, 9, 20):
        text = words * repeats
        kept, cut, tokens = split_at_window(text, keep, num_windows)
        whole = cut + kept if keep == "end" else kept + cut
        assert whole.replace(" ", "") == clean(text).replace(" ", "")
        assert tokens == min(len(encode(text)), 75 * num_windows)
        assert (cut == "") == (tokens == len(encode(text)))


WRONG_TURNS: list[Any] = ["a red ball", None, [1], [("a", "b")], [Turn("a", "b")], [Turn(0, 3)]]  # type: ignore[arg-type]


@pytest.mark.parametrize("turns", WRONG_TURNS, ids=repr)
def test_wrong_turns_are_one_line(model: Model, turns: Any) -> None:
    for call in (model.generate, model.read):
        with pytest.raises(D2IError, match=r"^turns: got .*, expected .*$"):
            call(turns)


@pytest.mark.parametrize("turns", [[], [""], [Turn(0, " ")]], ids=repr)
def test_a_dialog_without_text_is_an_error(model: Model, turns: Any) -> None:
    with pytest.raises(DataError, match="the dialog is empty"):
        model.generate(turns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed: got -1, expected 0 to"),
        ({"seed": 2**63}, "seed: got .*, expected 0 to"),
        ({"seed": True}, "seed: got True, expected 0 or more, or a list"),
        ({"seed": []}, r"seed: got \[\], expected"),
        ({"seed": "7"}, "seed: got '7', expected"),
        ({"key": ""}, "key: got '', expected text"),
        ({"key": 3}, "key: got 3, expected text"),
        ({"key": "a\ud800"}, "key: got .*, expected text"),
        ({"roles": ["user"]}, "roles: got .* for 2 turns, expected user or assistant for each"),
        ({"roles": ["user", "system"]}, "roles: got .*, expected user or assistant for each"),
        ({"roles": "user"}, "roles: got 'user' for 2 turns"),
        ({"num_steps": 0}, "num_steps: got 0, which the setting sample.num_steps does not"),
        ({"num_steps": 1.5}, "num_steps: got 1.5, expected a whole number"),
        ({"guidance_scale": 0.5}, "guidance_scale: got 0.5, which the setting"),
        ({"guidance_scale": "2"}, "guidance_scale: got '2', expected a number"),
        ({"on_step": 3}, "on_step: got 3, expected a function"),
    ],
)
def test_wrong_options_of_a_call_are_one_line(
    model: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(D2IError, match=message) as raised:
        model.generate(CHAT, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        ("nope", {}, "unknown system"),
        (3, {}, "system: got 3, expected text"),
        ("uvit-s", {}, "got no weights"),
        ("run:nowhere", {}, "is not a run"),
        (Path("nowhere"), {}, "is not a run"),
        ("images:nowhere", {}, "generates nothing; expected a system that does"),
        ("uvit-s", {"settings": "sample.num_steps=2"}, "settings: got 'sample.num_steps=2'"),
        ("uvit-s", {"settings": ["sample.num_step=2"]}, "did you mean 'num_steps'"),
        ("uvit-s", {"settings": ["text.format=chat"]}, "has no chat template"),
        ("uvit-s", {"device": "nowhere"}, "device: got 'nowhere'"),
        ("uvit-s", {"compute_batch_size": 0}, "compute_batch_size: got 0, expected 1 or more"),
        ("uvit-s", {"weights": "demo:none"}, "no such shipped model"),
        ("uvit-s", {"weights": 5}, "weights: got 5, expected a path or a name"),
        # The encoders of this recipe are on the hub: the weights are missed first.
        ("uvit-s", {"weights": "nofile.pth"}, "nofile.pth does not exist; expected mscoco_uvit"),
    ],
)
def test_wrong_arguments_of_load_are_one_line(
    system: Any, options: dict[str, Any], message: str
) -> None:
    given = (
        {} if system != "uvit-s" or message == "got no weights" else {"weights": "demo:backbone"}
    )
    with pytest.raises(D2IError, match=message) as raised:
        d2i.load(system, **given | options)
    assert "\n" not in str(raised.value)


OWN_SYSTEM = """
import numpy as np
from d2i.eval.system import Generation


class Own:
    described = {}

    def generate(self, prompts):
        return [self.answer(prompt.text) for prompt in prompts]

    def answer(self, text):
        if "secret" in text:
            return Generation(None, "withheld")
        return Generation(np.full((8, 8, 3), 128, np.uint8))


def build(context):
    return Own()
"""


def test_a_system_of_your_own_answers_with_its_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_for_load.py").write_text(OWN_SYSTEM)
    monkeypatch.syspath_prepend(tmp_path)
    own = d2i.load("own_for_load:build", settings=["sample.seed=3"])
    assert own.generate(CHAT, seed=3).size == (8, 8)
    assert own.weights == ""
    refused: list[dict[str, Any]] = [
        {"seed": 0},
        {"seed": 3, "num_steps": 2},
        {"seed": 3, "on_step": print},
    ]
    for options in refused:
        with pytest.raises(D2IError, match=r"generates as it was loaded.*expected seed=3"):
            own.generate(CHAT, **options)
    with pytest.raises(D2IError, match="does not tell what it reads"):
        own.read(CHAT)
    with pytest.raises(GenerationError, match=r"^got no image: withheld; ") as raised:
        own.generate(["a secret"], seed=3)
    assert raised.value.reason == "withheld"


def test_latents_that_are_not_finite_are_no_image(model: Model) -> None:
    def break_network(step: int, latent: torch.Tensor) -> None:
        del latent
        if step == 1:
            with torch.no_grad():
                weight.fill_(float("nan"))

    system: Any = model._system
    weight = next(system._sampler._network.parameters())
    kept = weight.clone()
    try:
        with pytest.raises(GenerationError) as raised:
            model.generate(CHAT, on_step=break_network)
    finally:
        weight.copy_(kept)
    assert raised.value.reason == "not_finite"


def test_a_generation_error_survives_a_pickle() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(GenerationError("withheld")))
    assert (error.reason, str(error)) == ("withheld", str(GenerationError("withheld")))


def test_prompt_reads_as_evaluation_does(model: Model) -> None:
    prompt = model.prompt([Turn(0, "a"), Turn(-1, "be nice"), Turn(1, " b ")], key="test-1-0-0")
    assert prompt == Prompt("test-1-0-0", prompt.turns, "# a # b")
    assert re.fullmatch(r"[0-9a-f]{64}", model.weights)
