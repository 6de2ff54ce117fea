"""The recipes: the paper's six runs, published pipelines, photographs on a laptop, and the demo.

A recipe names no cluster, bucket or rank. A number from the paper carries its section; every other
is our default, with the reason.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from d2i.backbones import presets_of
from d2i.config import (
    SCRATCH,
    AdapterConfig,
    BackboneConfig,
    CorpusConfig,
    EncodersConfig,
    ImageConfig,
    MetricsConfig,
    OptimConfig,
    PreprocessConfig,
    Recipe,
    SampleConfig,
    TrainConfig,
    apply_settings,
    load_config,
)
from d2i.errors import ConfigError
from d2i.io import checksums, storage
from d2i.io.config_lock import diff, read_settings
from d2i.recipe_file import is_recipe_file, read_recipe_file

_KEPT_NAME = "recipe.json"
_PATHS = {
    "corpus": ("descriptions", "image_root"),
    "encoders": ("vae", "clip_image", "clip_text", "text_prefix"),
    "backbone": ("weights",),
    "fetch": ("downloads",),
    "metrics": ("extractor_weights", "clip_text"),
}

# Our defaults for what the paper (section 3.3) leaves open about training, in all six runs:
# - no gradient clipping, condition dropout 0.1 (0 for UniDiffuser's joint loss), EMA 0.9999:
#   as in U-ViT's published training;
# - EMA warm-up: that training took a million steps; after as few as here, 0.9999 alone would leave
#   an average that is 78 to 92 % initial weights;
# - no learning rate warm-up: the networks are already trained, and 3e-5 is a seventh of their
#   first rate;
# - bf16 under autocast where the paper says "mixed precision", as U-ViT's published training does
#   in float16: bf16 has the range of float32, so it needs no loss scale;
# - ZeRO-1: U-ViT needs no more, and UniDiffuser's float32 state is then shared by 80 GB devices.

# AdamW, its rate, weight decay and betas: paper, section 3.3.
_PUBLISHED_OPTIM = OptimConfig(lr=3e-5, weight_decay=0.03, betas=(0.9, 0.9))


def _uvit(name: str, *, corpus: str, global_batch_size: int, num_steps: int) -> Recipe:
    return Recipe(
        name=f"{name}-{corpus}",
        image=ImageConfig(resolution=256),  # paper, Table 5
        encoders=EncodersConfig(),
        backbone=BackboneConfig(name="uvit-s-deep" if name == "uvit-s-deep" else "uvit-s"),
        train=TrainConfig(
            num_steps=num_steps,
            global_batch_size=global_batch_size,  # paper, Table 5
            micro_batch_size=512,  # our default: fits in 80 GB
            optim=_PUBLISHED_OPTIM,
        ),
        sample=SampleConfig(guidance_scale=2.0),  # our default: U-ViT's published evaluation, s = 1
    )


def _unidiffuser(*, corpus: str, global_batch_size: int, num_steps: int) -> Recipe:
    return Recipe(
        name=f"unidiffuser-v1-{corpus}",
        image=ImageConfig(resolution=512),  # paper, Table 5
        encoders=EncodersConfig(text_prefix="caption_decoder.pth"),
        backbone=BackboneConfig(name="unidiffuser-v1"),
        train=TrainConfig(
            num_steps=num_steps,
            global_batch_size=global_batch_size,  # paper, Table 5
            micro_batch_size=10,  # our default: fits in 80 GB; divides 260 and 800 on 2 devices
            optim=_PUBLISHED_OPTIM,
            activation_checkpointing=True,  # our default: UniDiffuser's published configuration
        ),
        # Our default: the published s = 7.
        sample=SampleConfig(guidance_scale=8.0, compute_batch_size=8),
        metrics=MetricsConfig(resolution=256),  # our default: comparable with U-ViT's images
    )


# The numbers of steps are our defaults, as the paper gives none: about 60 epochs of PhotoChat's
# 10,286 dialogs, and about 10 epochs (U-ViT) or 2 (UniDiffuser) of MMDialog's million instances.
def uvit_s_photochat() -> Recipe:
    """U-ViT-S on PhotoChat: 256 px, batch 740 (paper, Table 5)."""
    return _uvit("uvit-s", corpus="photochat", global_batch_size=740, num_steps=850)


def uvit_s_deep_photochat() -> Recipe:
    """U-ViT-S-Deep on PhotoChat: 256 px, batch 512 (paper, Table 5)."""
    return _uvit("uvit-s-deep", corpus="photochat", global_batch_size=512, num_steps=1200)


def unidiffuser_v1_photochat() -> Recipe:
    """UniDiffuser-v1 on PhotoChat: 512 px, batch 260 (paper, Table 5)."""
    return _unidiffuser(corpus="photochat", global_batch_size=260, num_steps=2400)


def uvit_s_mmdialog() -> Recipe:
    """U-ViT-S on MMDialog: 256 px, batch 4096 (paper, Table 5)."""
    return _uvit("uvit-s", corpus="mmdialog", global_batch_size=4096, num_steps=2450)


def uvit_s_deep_mmdialog() -> Recipe:
    """U-ViT-S-Deep on MMDialog: 256 px, batch 4096 (paper, Table 5)."""
    return _uvit("uvit-s-deep", corpus="mmdialog", global_batch_size=4096, num_steps=2450)


def unidiffuser_v1_mmdialog() -> Recipe:
    """UniDiffuser-v1 on MMDialog: 512 px, batch 800 (paper, Table 5)."""
    return _unidiffuser(corpus="mmdialog", global_batch_size=800, num_steps=2500)


_SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


_Z_IMAGE = "Tongyi-MAI/Z-Image"
_FLUX2_KLEIN = "black-forest-labs/FLUX.2-klein-base-4B"
_SANA = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"


# Our defaults in all of these: PhotoChat's photographs, as MMDialog's 256 pixels would have to be
# upscaled, and the network would learn their blur, so upscaling by more than 1.5 is refused; the
# batch and the number of steps (about 19 epochs). Rate, weight decay, betas and clipping are those
# of diffusers' training scripts.
def _pipeline(
    name: str,
    base: BackboneConfig,
    resolution: int,
    lr: float,
    adapter: AdapterConfig,
    encoder_batch_size: int = 32,
    corpus: CorpusConfig | None = None,
) -> Recipe:
    is_large = resolution > 512
    return Recipe(
        name=name,
        corpus=corpus or CorpusConfig(),
        image=ImageConfig(resolution=resolution, max_upscale=1.5),
        encoders=EncodersConfig(compute_batch_size=encoder_batch_size),
        backbone=base,
        adapter=adapter,
        train=TrainConfig(
            num_steps=3000,
            global_batch_size=64,
            micro_batch_size=2 if is_large else 8,
            optim=OptimConfig(lr=lr, weight_decay=1e-2, betas=(0.9, 0.999), max_grad_norm=1.0),
            activation_checkpointing=True,
        ),
        sample=SampleConfig(compute_batch_size=2 if is_large else 8),
        metrics=MetricsConfig(resolution=256),  # our default: comparable with U-ViT's images
    )


def sd15_lora_photochat() -> Recipe:
    """Stable Diffusion 1.5 on PhotoChat: a LoRA of rank 16 at 512 px (our default)."""
    base = BackboneConfig(name="sd15", weights=_SD15)
    adapter = AdapterConfig(kind="lora")
    return _pipeline("sd15-lora-photochat", base, 512, 1e-4, adapter)


def sd15_photochat() -> Recipe:
    """Stable Diffusion 1.5 on PhotoChat: the whole network at 512 px (our default)."""
    base = BackboneConfig(name="sd15", weights=_SD15)
    return _pipeline("sd15-photochat", base, 512, 1e-5, AdapterConfig())


def sdxl_lora_photochat() -> Recipe:
    """Stable Diffusion XL on PhotoChat: a LoRA of rank 16 at 1024 px (our default)."""
    base = BackboneConfig(name="sdxl", weights=_SDXL)
    adapter = AdapterConfig(kind="lora")
    return _pipeline("sdxl-lora-photochat", base, 1024, 1e-4, adapter)


# Every linear layer gets a LoRA in the two: the published scripts' targets are for twenty images.
# They start at 512 pixels, which PhotoChat's photographs fill. A language model encodes 8 texts
# at once. The photograph's own turn, which has no text, tells text.format=chat who shares it.
_WITH_OWN_TURN = CorpusConfig(own_turn="include")


def z_image_lora_photochat() -> Recipe:
    """Z-Image on PhotoChat: a LoRA of rank 16 at 512 px (our default)."""
    base = BackboneConfig(name="z-image", weights=_Z_IMAGE)
    adapter = AdapterConfig(kind="lora", targets="all-linear")
    return _pipeline("z-image-lora-photochat", base, 512, 1e-4, adapter, 8, _WITH_OWN_TURN)


def flux2_klein_lora_photochat() -> Recipe:
    """FLUX.2 klein (base, 4B) on PhotoChat: a LoRA of rank 16 at 512 px (our default)."""
    base = BackboneConfig(name="flux2-klein", weights=_FLUX2_KLEIN)
    adapter = AdapterConfig(kind="lora", targets="all-linear")
    return _pipeline("flux2-klein-lora-photochat", base, 512, 1e-4, adapter, 8, _WITH_OWN_TURN)


def sana_photochat() -> Recipe:
    """Sana 1.6B on PhotoChat: the whole network at 1024 px (our default)."""
    base = BackboneConfig(name="sana", weights=_SANA)
    return _pipeline("sana-photochat", base, 1024, 1e-5, AdapterConfig(), 8)


# The objects of the synthetic demo world, worded as in its captions.
DEMO_CLASSES = tuple(
    f"a {colour} {shape}"
    for colour in ("red", "yellow", "green", "blue", "pink", "white")
    for shape in ("ball", "box", "tent", "ring", "star")
)


def demo() -> Recipe:
    """The small shipped network on the synthetic corpus: every stage in minutes on two cores."""
    return Recipe(
        name="demo",
        image=ImageConfig(resolution=64),
        encoders=EncodersConfig(
            vae="demo:vae", clip_image="demo:clip_image", clip_text="demo:clip_text"
        ),
        backbone=BackboneConfig(name="uvit-s", weights="demo:backbone"),
        preprocess=PreprocessConfig(num_samples_per_shard=256),
        train=TrainConfig(
            num_steps=300,
            global_batch_size=64,
            micro_batch_size=32,
            optim=OptimConfig(lr=1e-3, num_warmup_steps=20, max_grad_norm=1.0),
            precision="fp32",
            num_checkpoint_steps=50,
        ),
        sample=SampleConfig(num_steps=20, guidance_scale=2.0, compute_batch_size=32),
        metrics=MetricsConfig(extractor="clip", classes=DEMO_CLASSES, clip_text="demo:clip_text"),
    )


# All numbers are our defaults:
# - TAESD, 2.4 million parameters, encodes photographs on a CPU; its latents need no scale;
# - one published CLIP, ViT-B/32, is both text and image encoder, so there is one download;
# - the network, of 7.8 million parameters, is trained from random weights, as none of its size are
#   published. So its rate, clipping and warm-up are higher than those of fine-tuning;
# - the EMA is the warm-up's, a tenth of the steps long: 0.9999 binds after 90,000 steps;
# - float32, as bf16 is slow on laptops' CPUs and unknown to their older GPUs.
def small() -> Recipe:
    """U-ViT of 7.8 M parameters from random weights, on your own photographs: 128 px, a laptop."""
    clip = "openai/clip-vit-base-patch32"
    return Recipe(
        name="small",
        image=ImageConfig(resolution=128),
        encoders=EncodersConfig(
            vae="madebyollin/taesd", vae_kind="tiny", clip_image=clip, clip_text=clip
        ),
        backbone=BackboneConfig(
            name="uvit-s",
            weights=SCRATCH,
            latent_scale=1.0,
            latent_size=16,
            dim=256,
            depth=8,
            num_heads=4,
            text_dim=512,
        ),
        preprocess=PreprocessConfig(num_samples_per_shard=256),
        train=TrainConfig(
            num_steps=10_000,
            global_batch_size=32,
            micro_batch_size=32,
            optim=OptimConfig(lr=5e-4, num_warmup_steps=200, max_grad_norm=1.0),
            precision="fp32",
            num_checkpoint_steps=500,
        ),
        sample=SampleConfig(num_steps=25, guidance_scale=3.0, compute_batch_size=16),
        metrics=MetricsConfig(extractor="clip", clip_text=clip),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "small": small,
    "uvit-s-photochat": uvit_s_photochat,
    "uvit-s-deep-photochat": uvit_s_deep_photochat,
    "unidiffuser-v1-photochat": unidiffuser_v1_photochat,
    "uvit-s-mmdialog": uvit_s_mmdialog,
    "uvit-s-deep-mmdialog": uvit_s_deep_mmdialog,
    "unidiffuser-v1-mmdialog": unidiffuser_v1_mmdialog,
    "sd15-lora-photochat": sd15_lora_photochat,
    "sd15-photochat": sd15_photochat,
    "sdxl-lora-photochat": sdxl_lora_photochat,
    "z-image-lora-photochat": z_image_lora_photochat,
    "flux2-klein-lora-photochat": flux2_klein_lora_photochat,
    "sana-photochat": sana_photochat,
}


def resolve_recipe(name: str, settings: Sequence[str]) -> Recipe:
    """Return a recipe with `--set` settings applied and local paths made absolute.

    A recipe's file may come from somebody else, so the URLs in it are treated as in
    `change_recipe`.

    Args:
        name: As in `load_recipe`.
        settings: The values of `--set`.

    Raises:
        ConfigError: If there is no such recipe, or a setting is unknown or wrong.
    """
    recipe = load_recipe(name)
    if is_recipe_file(name):
        _refuse_hosts(recipe, {setting.partition("=")[0] for setting in settings})
    return _changed(recipe, settings)


def change_recipe(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Apply `--set` settings to a recipe that was read from a directory, and make paths absolute.

    The directory may come from somebody else. URLs with a host count only if a setting repeats
    them, so that no file makes a command contact a host that its user did not name.

    Raises:
        ConfigError: If a setting is unknown or wrong, or the recipe names such a URL.
    """
    # A run's network generates with the run's own weights, never with its initial ones.
    given = {setting.partition("=")[0] for setting in settings}
    _refuse_hosts(recipe, given | {"backbone.weights"})
    return _changed(recipe, settings)


def _refuse_hosts(recipe: Recipe, passed_over: set[str]) -> None:
    """Refuse URLs with a host, but in the settings that are passed over."""
    for section, names in _PATHS.items():
        for name in names:
            value = getattr(getattr(recipe, section), name)
            if value and f"{section}.{name}" not in passed_over:
                option = f"--set {section}.{name}=URL, or a local path"
                refuse_host(f"{section}.{name}", value, option)


def refuse_host(name: str, url: str, option: str) -> None:
    """Refuse to contact a host that a file names, which may come from somebody else.

    Args:
        name: The field that holds the URL, for the error.
        url: The URL there.
        option: The command's option for it, for the error.

    Raises:
        ConfigError: If the URL names a host.
    """
    if storage.names_host(url):
        raise ConfigError(
            f"{name} is {url!r}, a URL in a file that may be somebody else's; expected it in the "
            f"command, as d2i would contact its host; if you trust that host, give {option}"
        )


def _changed(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Apply settings, and make local paths absolute.

    Paths then do not depend on the working directory: workers of a cluster have another one, and
    so may the repeated command.
    """
    changed = apply_settings(recipe, settings)
    # These still count as unset, so that they follow when the setting that decides them changes.
    derived = presets_of(changed.backbone.name).unset(changed)
    parts = {}
    for section, names in _PATHS.items():
        part = getattr(changed, section)
        paths = {name: _absolute(getattr(part, name)) for name in names}
        paths = {name: path for name, path in paths.items() if path != getattr(part, name)}
        unset = {n for n in names if f"{section}.{n}" in derived} - part.model_fields_set
        parts[section] = part.model_copy(update=paths)
        parts[section].model_fields_set.difference_update(unset)
    return changed.model_copy(update=parts)


def _absolute(name: str | None) -> str | None:
    """Return an existing local path, or `DIR/*`, as an absolute one, any other name unchanged."""
    if not name or name == SCRATCH:
        return name
    path = Path(name)
    is_here = path.parent.exists() if name.endswith("/*") else path.exists()
    return str(path.absolute()) if is_here else name


def load_recipe(name: str) -> Recipe:
    """Return a named recipe, the one in a file, or the one a user's own function returns.

    Args:
        name: A name in `RECIPES`, a path or URL that ends in `.toml` or `.json`, or
            `package.module:function`.

    Raises:
        ConfigError: If there is no such recipe (it suggests the nearest name), or the file holds
            none.
    """
    if is_recipe_file(name):
        return read_recipe_file(name)
    if ":" in name:
        return _load_function(name)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(RECIPES)}"
        raise ConfigError(f"recipe {name}: no such recipe; {hint}")
    return RECIPES[name]()


def store_recipe(recipe: Recipe, data_url: str) -> None:
    """Store the recipe beside the data it prepared, for later stages."""
    data = (recipe.model_dump_json(indent=1) + "\n").encode()
    checksums.write_bytes(storage.join(data_url, _KEPT_NAME), data)


def read_stored_recipe(data_url: str) -> Recipe:
    """Return the recipe that a data directory, or that of one of its splits, was prepared with.

    Raises:
        ConfigError: If the directory was not made by d2i preprocess.
    """
    kept = _find_kept_recipe(data_url)
    if kept is None:
        raise ConfigError(
            f"{data_url} has no {_KEPT_NAME}; expected a directory made by d2i preprocess; "
            "check --data"
        )
    return kept


def check_prepared_with(
    recipe: Recipe, data_url: str, parts: Sequence[str] = ("image", "text", "encoders")
) -> None:
    """Check that data was prepared as a recipe says: resolution, text and encoders.

    `parts` are those that matter: a caller that encodes the text again can leave that out. Of a
    recipe that encodes text while training, neither the text nor its encoder matters.

    An encoder that was a local path is not compared: the same file may be elsewhere now, and its
    weights are compared when it is loaded (`d2i.encoders.data_fingerprint`). Shards that d2i
    preprocess did not make have no recipe beside them, and are accepted unchecked.

    Raises:
        ConfigError: If it was not, as the features would differ; it names the differences.
    """
    kept = _find_kept_recipe(data_url)
    if kept is None:
        return
    if recipe.text.encode == "on_the_fly":
        parts = ["image_encoders" if part == "encoders" else part for part in parts]
        parts = [part for part in parts if part != "text"]
    decided, there = (
        {part: features[part] for part in parts}
        for features in (_features_of(recipe), _features_of(kept))
    )
    for part in {"encoders", "image_encoders"} & there.keys():
        for name, value in there[part].items():
            if any(v and Path(v).is_absolute() for v in (value, decided[part][name])):
                decided[part][name] = value
    if named := diff(decided, there):
        raise ConfigError(
            f"{data_url} was prepared with other settings: got {'; '.join(named[:3])}; repeat the "
            "--set of d2i preprocess, or prepare the data again"
        )


def _features_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that determine the features; batches and limits do not."""
    return {
        "image": recipe.image.model_dump(include={"resolution"}),
        "text": recipe.text.model_dump(exclude={"encode", "format", "roles"}),
        "encoders": recipe.encoders.model_dump(exclude={"compute_batch_size"}),
        "image_encoders": recipe.encoders.model_dump(include={"vae", "vae_kind", "clip_image"}),
    }


def _find_kept_recipe(data_url: str) -> Recipe | None:
    parent = storage.resolve(data_url).rpartition("/")[0]
    for directory in (data_url, parent):
        url = storage.join(directory, _KEPT_NAME)
        if storage.exists(url):
            return load_config(Recipe, read_settings(url), source=url)
    return None


def _load_function(name: str) -> Recipe:
    module_name, _, function_name = name.partition(":")
    try:
        recipe = getattr(importlib.import_module(module_name), function_name)()
    except (ImportError, AttributeError, TypeError, ValueError) as err:
        raise ConfigError(
            f"recipe {name}: {err}; expected an importable module:function without arguments"
        ) from err
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"recipe {name} returned {type(recipe).__name__}; expected a d2i.config.Recipe"
        )
    return recipe
