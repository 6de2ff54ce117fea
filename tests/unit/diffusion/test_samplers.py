"""A generated image depends on its key, seed and text alone, not on the rest of the batch."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from d2i.config import BackboneConfig, SampleConfig, apply_settings
from d2i.dialog import linearize
from d2i.diffusion import ancestral
from d2i.diffusion.draws import SampleDraws, normal
from d2i.diffusion.samplers import run_sampler
from d2i.encoders import Vae
from d2i.errors import ConfigError, DataError
from d2i.eval.sampler import Sampler
from d2i.eval.single_dialog import grid, read_dialog, read_roles
from d2i.models import build_backbone, save_weights
from tests.processes import COMMAND

# diffusers' schedulers use a deprecated protocol of numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EMPTY = np.zeros((77, 64), np.float16)
QUICK = {"num_steps": 1, "compute_batch_size": 3}
KEYS = ["a", "b", "c", "d", "e"]
SHELL_WITHOUT_STDIN = ("sh", "-c", 'exec "$0" "$@" <&-')


def text_of(keys: list[str]) -> NDArray[np.float16]:
    """Return text latents that differ between keys."""
    return normal(7, "text", keys, 0, (77, 64)).astype(np.float16)


@cache
def demo_sampler(**changed: Any) -> Sampler:
    """Return the demo network with one step and three rows a batch."""
    config = SampleConfig.model_validate(QUICK | changed)
    backbone = BackboneConfig(name="uvit-s", weights="demo:backbone")
    return Sampler(backbone, Vae("demo:vae", "kl"), config, EMPTY)


@cache
def all_images(**changed: Any) -> NDArray[np.uint8]:
    """Generate the images of all keys, each with its own seed."""
    return demo_sampler(**changed).generate(KEYS, text_of(KEYS), range(len(KEYS)))


@settings(max_examples=6)
@given(st.lists(st.sampled_from(range(len(KEYS))), min_size=1, max_size=4))
def test_image_is_independent_of_batch_neighbours(rows: list[int]) -> None:
    keys = [KEYS[row] for row in rows]
    found = demo_sampler().generate(keys, text_of(keys), rows)
    np.testing.assert_array_equal(found, all_images()[rows])


@pytest.mark.parametrize(
    "sampler", ["diffusers:DPMSolverMultistepScheduler", "diffusers:DDPMScheduler"]
)
def test_diffusers_scheduler_is_independent_of_batch_neighbours(sampler: str) -> None:
    together = all_images(sampler=sampler, num_steps=2)
    alone = demo_sampler(sampler=sampler, num_steps=2).generate(["d"], text_of(["d"]), [3])
    np.testing.assert_array_equal(alone[0], together[3])
    assert (together[3] != all_images()[3]).any()


@pytest.mark.parametrize(("precision", "max_distance"), [("bf16", 4.0), ("fp16", 0.5)])
def test_half_precision_is_close_and_independent_of_batch(
    precision: str, max_distance: float
) -> None:
    rounded = all_images(precision=precision)
    alone = demo_sampler(precision=precision).generate(["d"], text_of(["d"]), [3])
    np.testing.assert_array_equal(alone[0], rounded[3])
    distance = np.abs(rounded.astype(float) - all_images()).mean()
    assert 0 < distance < max_distance


def test_key_seed_and_text_each_change_image() -> None:
    first = all_images()[0]
    for key, text, seed in (("b", "a", 0), ("a", "b", 0), ("a", "a", 1)):
        other = demo_sampler().generate([key], text_of([text]), [seed])[0]
        assert (other != first).any()


def test_seed_defaults_to_sample_settings() -> None:
    images = demo_sampler(seed=2).generate(["c"], text_of(["c"]))
    np.testing.assert_array_equal(images[0], all_images()[2])


def test_unidiffuser_generates_in_both_unconditional_modes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    purposes: set[str] = set()

    def recorded(seed: int, purpose: str, *args: Any) -> Any:
        purposes.add(purpose)
        return normal(seed, purpose, *args)

    monkeypatch.setattr("d2i.diffusion.draws.normal", recorded)
    sizes: dict[str, Any] = {"latent_size": 8, "dim": 16, "depth": 2, "num_heads": 2}
    sizes |= {"text_dim": 64, "clip_dim": 4}
    torch.manual_seed(0)
    save_weights(build_backbone("unidiffuser-v1", **sizes), tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    backbone = BackboneConfig(name="unidiffuser-v1", weights=weights, **sizes)
    images = {}
    for name, value in (("unconditional", "empty_token"), ("data_type", 0), ("seed", 0)):
        config = SampleConfig.model_validate(QUICK | {"guidance_scale": 8.0, name: value})
        sampler = Sampler(backbone, Vae("demo:vae", "kl"), config, EMPTY)
        images[name] = sampler.generate(KEYS, text_of(KEYS))
        np.testing.assert_array_equal(sampler.generate(["e"], text_of(["e"]))[0], images[name][4])
    assert (images["unconditional"] != images["seed"]).any()
    assert (images["data_type"] != images["seed"]).any()
    assert purposes == {"sample", "sample.clip", "sample.text"}


@pytest.mark.parametrize(
    ("name", "variance"), [("ancestral", "beta"), ("ancestral_posterior", "posterior")]
)
def test_ancestral_sampler_uses_keyed_noise(name: str, variance: Any) -> None:
    x = torch.from_numpy(normal(0, "x", KEYS, 0, (2, 3)))
    draws = SampleDraws([0] * len(KEYS), KEYS)

    def eps(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + n[:, None, None] / 1000

    noise = [normal(0, "sample.step", KEYS, step, (2, 3)) for step in range(999)]
    expected = ancestral(eps, x, [torch.from_numpy(z) for z in noise], variance)
    torch.testing.assert_close(run_sampler(name, eps, x, 1000, draws), expected, rtol=0, atol=0)
    alone = run_sampler(name, eps, x[1:2], 1000, SampleDraws([0], ["b"]))
    torch.testing.assert_close(alone, expected[1:2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampler=dpm", "sampler is 'dpm'"),
        ("sampler=diffusers:os.system", "sampler is 'diffusers:os.system'"),
        ("sampler=ancestral", "set num_steps=1000"),
    ],
)
def test_invalid_sampler_is_one_line_error(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_settings(SampleConfig(), [setting])
    assert apply_settings(SampleConfig(), ["sampler=ancestral", "num_steps=1000"])


def test_unknown_scheduler_is_rejected_before_loading_weights() -> None:
    config = SampleConfig(sampler="diffusers:DPMSolverMultistepsScheduler")
    backbone = BackboneConfig(name="uvit-s", weights="not there")
    with pytest.raises(ConfigError, match="has no such scheduler"):
        Sampler(backbone, Vae("demo:vae", "kl"), config, EMPTY)


@given(st.integers(1, 12))
def test_grid_shows_every_image_in_order(num: int) -> None:
    pixels = np.arange(num * 2 * 3 * 3, dtype=np.uint8).reshape(num, 2, 3, 3) + 1
    layout = grid(pixels)
    columns = layout.shape[1] // 3
    assert 0 <= columns - layout.shape[0] // 2 <= 1
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        cell = layout[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        np.testing.assert_array_equal(cell, image)


def test_read_dialog_accepts_lines_or_json() -> None:
    lines = read_dialog("hello\n\n  a red hat \n")
    assert [turn.text for turn in lines] == ["hello", "a red hat"]
    turns = read_dialog('["hi", {"speaker": 1, "text": "you"}]')
    assert [(turn.speaker, turn.text) for turn in turns] == [(None, "hi"), (1, "you")]
    for wrong in (
        *("", " \n", "[]", "[1]", '[""]', '{"txt": ""}', '[{"text": "a", "speaker": "x"}]', "[..."),
        *('["\\ud800"]', "[" * 100_000),
    ):
        with pytest.raises(DataError) as caught:
            read_dialog(wrong)
        assert len(str(caught.value).splitlines()) == 1


def _messages(role_key: str, text_key: str) -> list[dict[str, Any]]:
    """Return a question and its answer, which shows an image."""
    users, bots = ("human", "gpt") if role_key == "from" else ("user", "assistant")
    return [{role_key: users, text_key: "show me"}, {role_key: bots, text_key: "<image>\nhere"}]


MESSAGES = _messages("role", "content")
RECORDS: dict[str, Any] = {
    "plain": {
        "turns": [
            {"text": "show me", "speaker": 0},
            {"text": "here", "images": ["/odd.jpg"], "speaker": 1},
        ]
    },
    "marks": {"messages": [{"role": "system", "content": "x"}, *MESSAGES], "images": ["1.jpg"]},
    "sharegpt": {"id": 1, "conversations": _messages("from", "value"), "image": "1.jpg"},
    "listed messages": [MESSAGES[0], {"role": "assistant", "content": "here"}],
    "array": [{"conversations": _messages("role", "content"), "images": ["1.jpg"]}],
    "mmdialog": {
        "conversation_id": 1,
        "conversation": [
            {"turn": [{"__TEXT__": "show me"}]},
            {"turn": [{"__TEXT__": "here"}, {"__MEDIA__": "1"}]},
        ],
    },
    "photochat": {
        "dialogue_id": 1,
        "photo_url": "https://x.example/1.jpg",
        "dialogue": [
            {"message": "show me", "share_photo": False, "user_id": 0},
            {"message": "here", "share_photo": True, "user_id": 1},
        ],
    },
}


@pytest.mark.parametrize("form", RECORDS)
@pytest.mark.parametrize("indent", [None, 1])
def test_read_dialog_accepts_record_of_any_corpus(form: str, indent: int | None) -> None:
    turns = read_dialog(json.dumps(RECORDS[form], indent=indent) + "\n")
    assert linearize(turns, "letters") == "A: show me B: here"


def test_record_says_who_shares_the_image() -> None:
    user, assistant = "user", "assistant"
    assert read_roles("hello\n\nthere") == [user, user]
    assert read_roles('[{"speaker": 1, "text": "hi"}, "you"]') == [user, user]
    messages = [{"role": role, "content": role} for role in (user, assistant, user)]
    assert read_roles(json.dumps(messages)) == [user, assistant, user]
    turns = [{"speaker": 0, "text": "a"}, {"speaker": 1, "text": "b"}, {"speaker": 0, "text": "c"}]
    assert read_roles(json.dumps({"turns": turns})) == [user] * 3
    turns[2] = {"speaker": 0, "text": "c", "images": ["a.jpg"]}
    assert read_roles(json.dumps({"turns": turns})) == [assistant, user, assistant]
    of_user = [{"role": user, "content": "<image> see"}, {"role": assistant, "content": "oh"}]
    record = {"messages": of_user, "images": ["a.jpg"]}
    assert read_roles(json.dumps(record)) == [assistant, user]


@pytest.mark.parametrize(
    "wrong",
    [
        '{"messages": [{"role": "critic", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"turns": [{"text": "a"}]}\n{"turns": [{"text": "b"}]}',
        '{"turns": [{"txt": "a", "images": ["1.jpg"]}]}',
    ],
)
def test_read_dialog_rejects_malformed_records(wrong: str) -> None:
    with pytest.raises(DataError, match="the dialog"):
        read_dialog(wrong)


@pytest.mark.parametrize(
    "empty", [np.zeros((154, 64), np.float16), np.zeros((77, 768), np.float16)]
)
def test_text_latents_of_wrong_shape_are_rejected(empty: NDArray[np.float16]) -> None:
    backbone = BackboneConfig(name="uvit-s", weights="demo:backbone")
    with pytest.raises(ConfigError, match=r"text latents: got shape .*, expected \(77, 64\)"):
        Sampler(backbone, Vae("demo:vae", "kl"), SampleConfig.model_validate(QUICK), empty)


def test_unreadable_dialog_is_one_line_error() -> None:
    command = [*COMMAND, "sample", "--run", "none", "--dialog", "-"]
    closed = subprocess.run([*SHELL_WITHOUT_STDIN, *command], capture_output=True, check=False)
    garbled = subprocess.run(command, input=b"\xff\xfe", capture_output=True, check=False)
    for done, message in ((closed, b"stdin is closed"), (garbled, b"can't decode")):
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
