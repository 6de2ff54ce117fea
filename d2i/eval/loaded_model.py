"""A system, loaded once, that answers conversations with images: `d2i.load`.

`d2i sample` is made of it, and so is any program that keeps a network in memory.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast, get_args, overload

import torch
from PIL import Image

from d2i.backbones import backbones, chat_problem, presets_of
from d2i.config import BackboneConfig, Recipe, apply_settings
from d2i.dialog import Turn
from d2i.diffusion.dpm_solver import OnStep
from d2i.encoders import Encoders
from d2i.errors import CheckpointError, ConfigError, DataError, GenerationError
from d2i.eval.generation_settings import choose_settings
from d2i.eval.one_thread import one_thread
from d2i.eval.prompts import Prompt
from d2i.eval.system import (
    CallOptions,
    Generation,
    Read,
    ReadingSystem,
    System,
    SystemContext,
    SystemSpec,
    generate_with,
)
from d2i.eval.systems import build_system, parse_system
from d2i.io import storage
from d2i.prompt_text import Role, context_messages, context_text
from d2i.recipes import RECIPES, change_recipe, load_recipe, read_stored_recipe
from d2i.run_dir import CONFIG_NAME, read_recipe
from d2i.weights_catalog import weights_to_fetch
from d2i.weights_resolve import is_shipped, resolve_weights

_MAX_SEED = 2**63


def load(
    system: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
    settings: Sequence[str] = (),
    compute_batch_size: int | None = 4,
) -> Model:
    """Load a system that answers conversations with images.

    Args:
        system: As `d2i eval --system` takes it, such as `run:runs/a` or `diffusers:DIR`, or the
            path of a run. `images:DIR` is refused, as it generates nothing.
        weights: Weights of a backbone, such as a published file, a model directory or
            `demo:backbone`.
        device: The torch device to run on, such as `cuda:1`; None for `cuda` where there is one,
            else `cpu`, on which d2i computes with one thread, as its commands do.
        settings: Settings in the form of `--set`, such as `["sample.num_steps=20"]`. The others are
            those of the run (with the choice of `d2i select`); of `retrieve:DIR`, those of its
            data; of a backbone, those of its recipe; of other systems, those of `uvit-s-photochat`.
        compute_batch_size: Images that the network computes at once: every batch is padded to it,
            so that an image is the same alone or among others. Another size may change the last
            bits; None takes that of the settings, which `d2i eval` computes with.

    Raises:
        ConfigError: If there is no such system, or an argument or a setting is wrong.
        CheckpointError: If weights are missing, damaged or do not fit.
    """
    name, files = _system_name(system), _weights_name(weights)
    batches = _batch_settings(compute_batch_size)
    base, own = _base_recipe(name, files)
    given = _checked_settings(settings)
    choice = choose_settings(name, given, weights=files)
    recipe = change_recipe(base, [*own, *batches, *choice.settings])
    spec = parse_system(name, files, recipe)
    _expect_generator(spec)
    if spec.network:
        if problem := chat_problem(recipe):
            raise ConfigError(problem)
        _check_weights(spec.network)
    place = _device(device)
    with _as_commands_compute(place), _without_library_bars():
        encoders = Encoders(recipe.encoders, place)
        built = build_system(SystemContext(spec, recipe, encoders, (), place))
    return Model(built, spec, recipe, place)


class Model:
    """A system in memory; `d2i.load` makes one.

    An image is a function of the conversation, its key and its seed, under the settings that the
    system was loaded with: not of other images of the call, or of earlier calls. Systems of one
    latent shape draw the same noise for the same key and seed, so that their images can be
    compared. Use a model from one thread at a time; on a CPU, models of several threads compute
    one after the other.

    Attributes:
        recipe: All settings.
        device: The torch device.
        name: The system, as `--system` names it, with absolute paths.
        weights: sha256 of the weights that were trained; of a system without any, an empty text.
    """

    def __init__(self, system: System, spec: SystemSpec, recipe: Recipe, device: str) -> None:
        self._system, self._spec = system, spec
        self.recipe, self.device, self.name = recipe, device, spec.name
        self.weights = _weights_of(system, spec)

    @overload
    def generate(
        self,
        turns: Sequence[Turn] | Sequence[str],
        *,
        seed: int = ...,
        key: str | None = ...,
        roles: Sequence[Role] = ...,
        num_steps: int | None = ...,
        guidance_scale: float | None = ...,
        on_step: OnStep | None = ...,
    ) -> Image.Image: ...
    @overload
    def generate(
        self,
        turns: Sequence[Turn] | Sequence[str],
        *,
        seed: Sequence[int],
        key: str | None = ...,
        roles: Sequence[Role] = ...,
        num_steps: int | None = ...,
        guidance_scale: float | None = ...,
        on_step: OnStep | None = ...,
    ) -> list[Image.Image]: ...
    def generate(
        self,
        turns: Sequence[Turn] | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        key: str | None = None,
        roles: Sequence[Role] = (),
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Generate the image that answers a conversation.

        Args:
            turns: The conversation, oldest turn first: `Turn`s, or their texts, by two speakers in
                turn.
            seed: Seed of the noise, 0 or more; of several, one image each, computed in batches.
            key: Keys the noise together with the seed. The key of an instance gives the image of
                `d2i eval`; None takes the text of the conversation, as `d2i sample` does.
            roles: For a network that reads chats (`text.format=chat`), the role of each turn: who
                shares the image is the `assistant`; empty if all turns are the user's.
            num_steps: Steps of the sampler, for this call.
            guidance_scale: For this call.
            on_step: Called as `on_step(step, latent)` at each step of each batch; in each batch the
                steps count from 1. For networks
                sampled by d2i itself, `step` is the number of the network's evaluation, from 1, and
                `latent` the clean latents that it predicts, float32 (B, 4, h, w), unscaled, as
                shards hold them, of the B images of the batch. For a pipeline of diffusers,
                `step` is that of its scheduler, from 1, and `latent` its state after it, noised and
                at its own scale. An exception that it raises ends the call and is passed on; the
                model can be used as before.

        Returns:
            An RGB image, or for a list of seeds the list of theirs.

        Raises:
            GenerationError: If the system gives no image for one of the seeds, with its reason;
                `generate_prompts` returns those of the others.
            ConfigError: If an argument is wrong, or the system cannot take it.
            DataError: If the conversation has no text.
        """
        seeds = _seeds(seed)
        prompt = self.prompt(turns, key, roles)
        found = self.generate_prompts(
            [prompt] * len(seeds),
            seeds,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            on_step=on_step,
        )
        images = [_image(generation) for generation in found]
        return images[0] if _is_number(seed) else images

    def read(
        self,
        turns: Sequence[Turn] | Sequence[str],
        *,
        key: str | None = None,
        roles: Sequence[Role] = (),
    ) -> Read:
        """Return what the text encoder is given for a conversation; generates nothing.

        Args:
            turns: As for `generate`.
            key: As for `generate`: with `text.roles=permuted` it decides the roles.
            roles: As for `generate`.

        Raises:
            ConfigError: If the system does not tell, or the turns are not turns.
            DataError: If the conversation has no text.
        """
        if not isinstance(self._system, ReadingSystem):
            raise ConfigError(
                f"{self.name} does not tell what it reads; expected a run, a backbone or "
                "diffusers:PATH"
            )
        with _as_commands_compute(self.device):
            return self._system.read(self.prompt(turns, key, roles))

    def prompt(
        self,
        turns: Sequence[Turn] | Sequence[str],
        key: str | None = None,
        roles: Sequence[Role] = (),
    ) -> Prompt:
        """Return the prompt of a conversation.

        Args:
            turns: As for `generate`.
            key: As for `generate`.
            roles: As for `generate`.

        Raises:
            ConfigError: If an argument is wrong.
            DataError: If the conversation has no text.
        """
        checked = _turns(turns)
        _check_roles(roles, len(checked))
        text = context_text(checked, self.recipe.text)
        messages = context_messages(checked, roles, self.recipe.text) if roles else ()
        if key is not None and not (isinstance(key, str) and key and _is_unicode(key)):
            raise ConfigError(f"key: got {key!r}, expected text, or None for the conversation's")
        return Prompt(text if key is None else key, checked, text, messages)

    def generate_prompts(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
    ) -> list[Generation]:
        """Generate one image per prompt, also of several conversations; they share batches.

        Args:
            prompts: From `prompt`.
            seeds: The seed of each.
            num_steps: As for `generate`.
            guidance_scale: As for `generate`.
            on_step: As for `generate`.

        Returns:
            The pixels of each, or the reason why there are none.

        Raises:
            ConfigError: If an argument is wrong, or the system cannot take it.
        """
        if on_step is not None and not callable(on_step):
            raise ConfigError(f"on_step: got {on_step!r}, expected a function of (step, latent)")
        steps = None if num_steps is None else _number("num_steps", num_steps, Integral)
        scale = None if guidance_scale is None else _number("guidance_scale", guidance_scale, Real)
        self._check_sampling(steps, scale)
        options = CallOptions(list(seeds), steps, scale, on_step)
        with _as_commands_compute(self.device):
            return generate_with(self._system, self.name, self.recipe.sample, prompts, options)

    def _check_sampling(self, num_steps: int | None, guidance_scale: float | None) -> None:
        """Check them as the settings of the same name are."""
        given = {"num_steps": num_steps, "guidance_scale": guidance_scale}
        for name, value in given.items():
            if value is None:
                continue
            try:
                apply_settings(self.recipe, [f"sample.{name}={json.dumps(value)}"])
            except ConfigError as err:
                raise ConfigError(
                    f"{name}: got {value!r}, which the setting sample.{name} does not take; see "
                    "'d2i recipes show'"
                ) from err


def _system_name(system: str | os.PathLike[str]) -> str:
    """Return a system as `--system` names it; the path of a run is one, too."""
    if not isinstance(system, str | os.PathLike):
        raise ConfigError(
            f"system: got {system!r}, expected text as --system takes it, or the path of a run"
        )
    name = os.fspath(system)
    is_named = name in backbones() or re.match(r"[\w.-]+:(?!//)", name)
    is_path = isinstance(system, os.PathLike)
    if is_path or (not is_named and storage.exists(storage.join(name, CONFIG_NAME))):
        return f"run:{name}"
    return name


def _weights_name(weights: Any) -> str | None:
    if weights is not None and not isinstance(weights, str | os.PathLike):
        raise ConfigError(f"weights: got {weights!r}, expected a path or a name, or None")
    return None if weights is None else os.fspath(weights)


def _check_weights(network: BackboneConfig) -> None:
    """Check that weights exist, before the encoders are loaded, or even downloaded."""
    is_pipeline = presets_of(network.name).pipeline is not None
    if not (
        network.is_random or is_pipeline or Path(resolve_weights(str(network.weights))).exists()
    ):
        raise CheckpointError(
            f"{network.weights} does not exist; expected {weights_to_fetch(network.name)}, a model "
            "directory or a run; check the path"
        )


def _batch_settings(size: int | None) -> list[str]:
    if size is None:
        return []
    if not _is_number(size) or operator.index(size) < 1:
        raise ConfigError(
            f"compute_batch_size: got {size!r}, expected 1 or more, or None for the settings'"
        )
    return [f"{part}.compute_batch_size={operator.index(size)}" for part in ("sample", "encoders")]


def _checked_settings(settings: Sequence[str]) -> list[str]:
    is_list = isinstance(settings, Sequence) and not isinstance(settings, str)
    if not is_list or not all(isinstance(setting, str) for setting in settings):
        raise ConfigError(
            f"settings: got {settings!r}, expected a list of NAME=VALUE, such as "
            "['sample.num_steps=20']"
        )
    return list(settings)


def _base_recipe(system: str, weights: str | None) -> tuple[Recipe, list[str]]:
    """Return the recipe that a system is loaded with, and settings that name its network."""
    kind, _, target = system.partition(":")
    if kind == "divter":
        return _base_recipe(target.partition(",")[2], weights)
    if kind == "run" and target:
        return read_recipe(target), []
    if kind == "retrieve" and target:
        return read_stored_recipe(target), []
    if system not in backbones() or weights is None:
        return load_recipe("uvit-s-photochat"), []
    if is_shipped(weights):
        return load_recipe("demo"), []
    settings = [f"backbone.name={system}", f"backbone.weights={json.dumps(weights)}"]
    recipes = [make() for name, make in RECIPES.items() if name != "demo"]
    family = presets_of(system)
    of_family = [r for r in recipes if presets_of(r.backbone.name) is family]
    same = [r for r in of_family if r.backbone.name == system]
    return (same or of_family or recipes)[0], settings


def _expect_generator(spec: SystemSpec) -> None:
    if spec.kind == "images":
        raise ConfigError(
            f"{spec.name} generates nothing; expected a system that does, such as run:DIR"
        )
    if spec.inner:
        _expect_generator(spec.inner)


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, ValueError, NotImplementedError) as err:
        reason = (str(err).strip() or repr(err)).splitlines()[0].partition(". ")[0][:120]
        raise ConfigError(
            f"device: got {device!r}: {reason}; expected cpu, or cuda on a machine that has one"
        ) from err
    return str(found)


def _as_commands_compute(device: str) -> AbstractContextManager[None]:
    """Return a context that computes on a CPU with one thread, as the commands do."""
    return one_thread() if torch.device(device).type == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def _without_library_bars() -> Iterator[None]:
    """Keep the progress bars of transformers and diffusers off the user's stderr."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown: list[Any] = [
        library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _weights_of(system: System, spec: SystemSpec) -> str:
    described: Any = system.described
    names = ["backbone"]
    if spec.network and presets_of(spec.network.name).pipeline:
        names = ["adapter", presets_of(spec.network.name).network_part]
    return next((str(described[name]) for name in names if name in described), "")


def _turns(turns: Any) -> tuple[Turn, ...]:
    is_list = isinstance(turns, Sequence) and not isinstance(turns, str | bytes)
    if not is_list or not all(isinstance(turn, Turn | str) for turn in turns):
        got = repr(turns) if not is_list else repr(next(t for t in turns if not _is_turn(t)))
        raise ConfigError(
            f"turns: got {got[:100]}, expected a list of texts, or of d2i.dialog.Turn(speaker, "
            "text), oldest first, such as ['what did you see?', 'a red ball']"
        )
    found = tuple(Turn(None, turn) if isinstance(turn, str) else turn for turn in turns)
    for turn in found:
        _check_turn(turn)
    if not any(turn.text.strip() for turn in found):
        raise DataError("the dialog is empty; expected at least one turn with text; add one")
    return found


def _check_roles(roles: Any, num_turns: int) -> None:
    is_list = isinstance(roles, Sequence) and not isinstance(roles, str)
    if not is_list or len(roles) not in (0, num_turns) or not set(roles) <= set(get_args(Role)):
        raise ConfigError(
            f"roles: got {roles!r} for {num_turns} turns, expected user or assistant for each, or "
            "no role at all"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_turn(value: Any) -> bool:
    return isinstance(value, Turn | str)


def _check_turn(turn: Turn) -> None:
    speaker, text = cast("tuple[Any, Any]", (turn.speaker, turn.text))
    if not isinstance(text, str) or not (speaker is None or _is_number(speaker)):
        raise ConfigError(
            f"turns: got {turn!r}, expected Turn(speaker, text) with a whole number or None, and "
            "text"
        )
    if not _is_unicode(text):
        raise DataError(f"turns: got {text!r}; expected text that is Unicode; correct it")


def _is_number(value: Any, kind: type = Integral) -> bool:
    """Return whether a value is a number, also of numpy; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _number(name: str, value: Any, kind: type) -> Any:
    if not _is_number(value, kind):
        expected = "a whole number" if kind is Integral else "a number"
        raise ConfigError(f"{name}: got {value!r}, expected {expected}, or None for the settings'")
    return int(value) if kind is Integral else float(value)


def _seeds(seed: Any) -> list[int]:
    values = [seed] if _is_number(seed) else seed
    is_list = isinstance(values, Sequence | range) and not isinstance(values, str | bytes)
    if not is_list or not values or not all(map(_is_number, values)):
        raise ConfigError(f"seed: got {seed!r}, expected 0 or more, or a list of such seeds")
    seeds = [operator.index(value) for value in values]
    if wrong := [value for value in seeds if not 0 <= value < _MAX_SEED]:
        raise ConfigError(f"seed: got {wrong[0]}, expected 0 to {_MAX_SEED - 1}")
    return seeds


def _image(generation: Generation) -> Image.Image:
    if generation.pixels is None:
        raise GenerationError(generation.reason)
    return Image.fromarray(generation.pixels)
