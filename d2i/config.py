"""The settings of d2i: frozen, checked, written as JSON, changed only by `--set a.b=value`.

Owns every field a recipe may hold. Must not import torch, ray or any stage.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from d2i.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Precision = Literal["fp32", "bf16", "fp16"]
TrainPrecision = Literal["fp32", "bf16", "bf16_weights", "fp16_weights"]
BackboneName = Literal["uvit-s", "uvit-s-deep", "unidiffuser-v0", "unidiffuser-v1"]
WeightsKind = Literal["ema", "ema-short", "trained"]


# The named linearizations (d2i.dialog), or the template of one turn.
_STRATEGY = r"^(hash|space|special|letters|[\s\S]*\{text\}[\s\S]*)$"
_SAMPLER = r"^(dpm_solver|ancestral|ancestral_posterior|diffusers:[A-Za-z0-9]+Scheduler)$"
_MAX_SHOWN = 80
# The model times of the published networks, n = 1..1000.
NUM_NOISE_LEVELS = 1000
# What settings were before they were there, for runs and evaluations that were begun then.
LEGACY_DEFAULTS: dict[str, Any] = {
    "corpus.split_shares": None,
    "corpus.split_seed": None,
    "fetch.downloads": None,
    "train.ema_warmup": False,
    "train.short_ema_length": None,
    "sample.weights": "ema",
}


class Config(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ImageConfig(Config):
    """How a picture becomes the encoder's input."""

    resolution: int = Field(default=256, gt=0, multiple_of=8)
    """Side in pixels of the centre square after LANCZOS resizing."""
    draft: bool = True
    """Whether JPEGs of four times the resolution or more are halved while they are decoded, which
    is two to four times as quick and changes pixels by 0.2 to 0.5 of 255 on average (ours)."""
    min_side: int = Field(default=16, gt=0)
    """Pictures with a shorter side are failed rows (`too_small`)."""
    max_aspect: float = Field(default=20.0, ge=1.0)
    """Pictures with a longer side over shorter side above this are failed rows (`odd_aspect`)."""
    max_megapixels: float = Field(default=90.0, gt=0)
    """Pictures whose header promises more are failed rows (`too_large`), and are not decoded."""


class CorpusConfig(Config):
    """What one instance is (`d2i.corpora`); `None` keeps the reader's own default."""

    direction: Literal["answer", "first"] | None = None
    """Whether the picture answers the turns before it, or precedes those after it."""
    own_turn: Literal["include", "exclude"] | None = None
    """Whether the text of the picture's own turn belongs to its context."""
    images_in_turn: Literal["all", "first"] | None = None
    """What several pictures in one turn become."""
    repeated: Literal["all", "unique"] | None = None
    """What a picture that several dialogs share becomes."""
    earlier_images: str | None = None
    """Text that stands for each picture shared earlier, such as `[photo]`."""
    emoji: Literal["keep", "unicode", "drop"] | None = None
    """What `:raising_hands:` becomes."""
    max_broken: float | None = Field(default=None, ge=0, le=1)
    """Share of a split's records that may be broken before the job refuses to go on."""
    split_shares: str | None = None
    """Own chats in one file: the shares of train, valid and test, such as `0.8,0.1,0.1`; dialogs
    that show the same picture stay together. `d2i preprocess --split` sets it."""
    split_seed: int | None = None
    """Decides which dialogs go where."""
    descriptions: str | None = None
    """File of descriptions that `d2i corpus --describe` made, for pictures without one."""
    image_root: str | None = None
    """The folder of the pictures, where it is not the corpus's own; or plain tars of them,
    `images.tar` or `s3://bucket/images/*.tar`. For web addresses there is `fetch.mirror`."""
    open_images_url: str | None = None
    """PhotoChat: the address of an Open Images picture, with `{photo_id}`."""

    def options(self) -> dict[str, Any]:
        """Return the options of the corpus that were set, by their names in `d2i.corpora`."""
        values = self.model_dump(exclude={"max_broken"})
        return {name: value for name, value in values.items() if value is not None}

    def divided(self, shares: str, seed: int) -> Self:
        """Return the same for one unsplit file that is divided by shares."""
        return self.model_copy(update={"split_shares": shares, "split_seed": seed})


class TextConfig(Config):
    """How a conversation becomes the text encoder's input."""

    strategy: Annotated[str, Field(pattern=_STRATEGY)] = "hash"
    """`hash`, `space`, `special`, `letters` (paper, Figure 4), or a template with `{text}`."""
    empty_turns: Literal["drop", "keep"] = "drop"
    """Whether a turn without text gets a mark of its own."""
    speaker_runs: Literal["keep", "merge"] = "keep"
    """Whether turns in a row by one speaker stay turns, or become one."""
    max_turns: int | None = Field(default=None, gt=0)
    """How many turns are read at most; `None` reads all that fit."""
    keep: Literal["end", "start"] = "end"
    """Which side of a context longer than the window is kept."""
    cut: Literal["token", "turn"] = "token"
    """Whether a context longer than the window is cut within a turn, or between turns."""
    num_windows: int = Field(default=1, ge=1, le=4)
    """Windows of 77 tokens; more than one goes beyond the paper."""
    latents: Literal["full", "none"] = "full"
    """Whether shards hold CLIP text latents or the token ids alone."""


class DialogConfig(Config):
    """The part of a recipe that says what an instance is, and how its context is written."""

    corpus: CorpusConfig = CorpusConfig()
    text: TextConfig = TextConfig()


class EncodersConfig(Config):
    """The frozen encoders: a shipped name (`demo:vae`), a folder, a file, or a hub repository."""

    vae: str
    vae_kind: Literal["kl", "tiny"] = "kl"
    """`kl`: diffusers AutoencoderKL. `tiny`: AutoencoderTiny, which has no log-variance."""
    clip_image: str = "openai/clip-vit-base-patch32"
    clip_text: str = "openai/clip-vit-large-patch14"
    text_prefix: str | None = None
    """UniDiffuser's Linear(768, 64), kept in the published `caption_decoder.pth`."""
    compute_batch_size: int = Field(default=32, gt=0)
    """Every encoder runs at this one, padded batch, so that grouping changes no bit."""


SCRATCH = "scratch"
"""`backbone.weights` of who means to train from random weights."""


class BackboneConfig(Config):
    """The network and where its fine-tuning starts. `None` keeps the published size."""

    name: BackboneName
    weights: str | None = None
    """Weights to start from: a file, a folder, a URL or `demo:backbone`; `scratch` draws random
    ones. Training asks for one of them; what reads no network does not."""
    latent_scale: float | None = Field(default=None, gt=0)
    latent_size: int | None = Field(default=None, gt=0)
    patch_size: int | None = Field(default=None, gt=0)
    dim: int | None = Field(default=None, gt=0)
    depth: int | None = Field(default=None, gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    text_dim: int | None = Field(default=None, gt=0)
    num_text_tokens: int | None = Field(default=None, gt=0)
    """77 for each of `text.num_windows`; weights of one window are grown to it."""
    clip_dim: int | None = Field(default=None, gt=0)

    @property
    def is_random(self) -> bool:
        """Whether training starts from random weights; runs made before say so by None."""
        return self.weights in (None, SCRATCH)

    @property
    def is_joint(self) -> bool:
        """Whether the network predicts picture and text together."""
        return self.name.startswith("unidiffuser")

    def overrides(self) -> dict[str, Any]:
        """Return the sizes that differ from the published ones, for `build_backbone`."""
        sizes = self.model_dump(exclude={"name", "weights"})
        return {name: value for name, value in sizes.items() if value is not None}


class OptimConfig(Config):
    """AdamW (paper, section 3.3)."""

    lr: float = Field(default=3e-5, gt=0)
    weight_decay: float = Field(default=0.03, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.9)
    eps: float = Field(default=1e-8, gt=0)
    num_warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up, then constant."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Longer gradients are cut to this norm; `None`, as published, cuts none."""


class UniDiffuserLossConfig(Config):
    """What UniDiffuser learns to predict (its paper, equation 1); U-ViT has one loss only."""

    loss: Literal["joint", "t2i"] = "joint"
    """`joint` predicts latent, CLIP image and text; `t2i` the first two beside a clean text."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """A weight for each predicted part; `None` is the mean over all predicted numbers together."""
    data_type: Literal[0, 1] = 1
    """UniDiffuser-v1's kind of data: 1 curated, 0 of the web."""

    @model_validator(mode="after")
    def _each_part_has_a_weight(self) -> Self:
        num_parts = 3 if self.loss == "joint" else 2
        if self.weights is not None and len(self.weights) != num_parts:
            raise ValueError(f"the {self.loss} loss has {num_parts} parts, so {num_parts} weights")
        return self


class TrainConfig(Config):
    """Everything that decides the numbers of one training run, and what is kept of it."""

    num_steps: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)
    """Samples an optimizer step over all ranks, for any number of ranks."""
    micro_batch_size: int = Field(gt=0)
    """The most samples a rank takes through the network at once."""
    optim: OptimConfig = OptimConfig()
    unidiffuser: UniDiffuserLossConfig = UniDiffuserLossConfig()
    precision: TrainPrecision = "bf16"
    """`bf16`: what the network multiplies in, by torch's autocast, as the published programs train:
    weights, gradients and their sums over micro batches and ranks stay in float32. `bf16_weights`
    and `fp16_weights` hold the whole network and its gradients in half precision, which takes half
    their memory and rounds those sums (ours; docs/fidelity.md)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What the ranks share of the optimizer's state, gradients and weights; one rank has nobody to
    share with, and takes stage 0 with weights in float32, or on a CPU, unless `--zero` says
    otherwise."""
    activation_checkpointing: bool = False
    """Whether blocks are computed again in the backward pass: a third more work, less memory."""
    compile: bool = False
    """Whether `torch.compile` fuses what lies between the matrix products of a block: quicker steps
    after a minute of compiling, which wants a C++ compiler and, on a GPU, Triton."""
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose text is replaced by that of '' (classifier-free guidance). Unset, 0
    for UniDiffuser's joint loss: its half without condition is learned at t^y = T."""
    ema_rate: float = Field(default=0.9999, ge=0, lt=1)
    """How much of the moving average of the weights (EMA) is kept at each step, at most."""
    ema_warmup: bool = True
    """Whether less is kept at first, as by diffusers' EMAModel: after step k nothing for k = 1,
    else min(ema_rate, k / (9 + k)); what is averaged is then a tenth of the steps old. Without it,
    a short training's average is still mostly the initial weights: 92 % after 850 steps."""
    short_ema_length: float | None = Field(default=0.05, gt=0, lt=0.09)
    """Length of a second, shorter average, as a share of the steps so far (EDM2's sigma_rel; the
    warm-up's is 0.09). It takes 4 bytes a parameter, shared as the EMA's are; `None` keeps none."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    order: Literal["global", "blocked"] = "global"
    """`global`: all samples shuffled. `blocked`: shards shuffled, then samples within a window of
    them, for shards that are fetched from elsewhere."""
    num_window_shards: int = Field(default=16, gt=0)
    """With `blocked`: the shards of a window."""
    num_reader_threads: int = Field(default=2, gt=0)
    """Threads that read and draw ahead of each rank."""
    num_checkpoint_steps: int = Field(default=1000, gt=0)
    """Steps between two checkpoints."""
    num_checkpoints_kept: int = Field(default=2, gt=0)
    """How many of the newest checkpoints are kept."""
    num_log_steps: int = Field(default=10, gt=0)
    """Steps between two lines of `metrics.jsonl`."""
    num_validation_steps: int = Field(default=500, gt=0)
    """Steps between two losses on fixed validation instances, where the data has any."""
    num_validation_samples: int = Field(default=256, gt=0)
    """How many instances those are at most."""
    record_keys: bool = False
    """Whether each rank writes down the keys of every step, as a proof of the order."""
    num_sample_steps: int | None = Field(default=None, gt=0)
    """Steps between two pictures of fixed validation dialogs; `None` draws none."""
    wandb_project: str | None = Field(default=None, min_length=1)
    """The project of Weights & Biases to which the run's lines are sent, too, as who is logged in
    there (`wandb login`, or `WANDB_MODE=offline`); `None` sends nothing anywhere."""

    @field_validator("precision", mode="before")
    @classmethod
    def _runs_made_before_say_fp16(cls, value: object) -> object:
        return "fp16_weights" if value == "fp16" else value

    @model_validator(mode="after")
    def _images_are_drawn_from_checkpoints(self) -> Self:
        if self.num_sample_steps and self.num_sample_steps % self.num_checkpoint_steps:
            raise ValueError(
                f"num_sample_steps must be a multiple of num_checkpoint_steps "
                f"({self.num_checkpoint_steps}), as pictures are drawn from checkpoints"
            )
        return self

    def accumulation(self, world_size: int) -> tuple[int, int]:
        """Split the global batch over ranks.

        Returns:
            The micro batch of one rank and the number of micro batches a step:
            `world_size * micro_batch * num_micro_batches == global_batch_size`.

        Raises:
            ConfigError: If the global batch does not divide by the number of ranks.
        """
        if self.global_batch_size % world_size:
            raise ConfigError(
                f"train.global_batch_size is {self.global_batch_size}, which {world_size} ranks "
                "cannot share; expected a multiple of the number of ranks; change "
                "--num-accelerators or --set train.global_batch_size"
            )
        per_rank = self.global_batch_size // world_size
        micro = max(m for m in range(1, self.micro_batch_size + 1) if per_rank % m == 0)
        return micro, per_rank // micro


class SampleConfig(Config):
    """How pictures are drawn from the network."""

    weights: WeightsKind = "ema"
    """Which of a run's weights: `ema`, the shorter average `ema-short`, or `trained`, those that
    the optimizer steps. Of no meaning for other systems, which have one kind of weights alone."""
    sampler: Annotated[str, Field(pattern=_SAMPLER)] = "dpm_solver"
    """`dpm_solver` (as published), `ancestral` or `ancestral_posterior` (the paper's Algorithm 2
    with sigma_n^2 = beta_n or the posterior variance, 1000 steps), or one of diffusers' schedulers,
    such as `diffusers:DPMSolverMultistepScheduler`."""
    num_steps: int = Field(default=50, gt=0)
    guidance_scale: float = Field(default=2.0, ge=1)
    """1 + s of `cond + s (cond - uncond)`: 2 for U-ViT, 8 for UniDiffuser."""
    unconditional: Literal["true_uncond", "empty_token"] = "true_uncond"
    """UniDiffuser's half without condition: pure noise as text (as published), or that of '';
    unset, the latter for the `t2i` loss, which learns no other."""
    data_type: Literal[0, 1] = 1
    """UniDiffuser-v1's kind of data: 1 curated (as published), 0 of the web."""
    precision: Precision = "fp32"
    """What the network multiplies in, by torch's autocast; weights and solver stay in float32. The
    published programs sample so, which is what GPUs are quick at; `bf16` changes a sample by some
    1e-2, `fp16` by 1e-3 (docs/models.md, Sampling)."""
    compute_batch_size: int = Field(default=50, gt=0)
    """The network runs at this one, padded batch, so that grouping changes no bit."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    pipeline: dict[str, int | float | str] = {}
    """Arguments of a diffusers pipeline's call, for the systems that are one; its own defaults
    hold for all others."""

    @model_validator(mode="after")
    def _ancestral_sampling_takes_all_steps(self) -> Self:
        if self.sampler.startswith("ancestral") and self.num_steps != NUM_NOISE_LEVELS:
            raise ValueError(f"sampler {self.sampler} needs num_steps={NUM_NOISE_LEVELS}")
        return self


class MetricsConfig(Config):
    """What the scores are computed on."""

    extractor: Literal["inception", "clip"] = "inception"
    """FID, KID and IS features: torch-fidelity's Inception, or the recipe's CLIP image encoder."""
    extractor_weights: str | None = None
    """Inception's weights file; `None` takes torch-fidelity's own cache."""
    extractor_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = None
    """First digits of the file's sha256; `None` expects the published file's. With any other
    weights, FID and IS are comparable with no published ones."""
    clip_text: str | None = "openai/clip-vit-base-patch32"
    """The text tower that shares its space with `encoders.clip_image`, for CLIP-T, retrieval and
    prompts; `None` goes without."""
    resolution: int | None = Field(default=None, gt=0)
    """Side at which pictures are measured; `None` takes the one they are drawn at. Scores of
    systems that draw at different sizes are comparable only at one."""
    classes: tuple[str, ...] = ()
    """With `clip`: the prompts whose zero-shot probabilities the Inception Score is read from."""


class PreprocessConfig(Config):
    """How records are planned and what shards keep."""

    choose: Literal["hash", "reservoir", "first"] = "hash"
    """Which instances `--limit` keeps: by a seeded hash of their keys, whatever the order of
    reading; drawn while reading; or the first ones read."""
    num_samples_per_shard: int = Field(default=1000, gt=0)
    encoder_precision: Precision = "fp32"
    """What the frozen encoders multiply in while data is prepared, by torch's autocast; weights
    stay float32. `bf16` changes about 1 % of the moments' size, `fp16` 0.3 % (ours, benchmarks/);
    it can only pay on GPUs. What training and evaluation encode themselves is in float32."""
    keep_images: Literal["auto", "always"] = "auto"
    """`auto`: source bytes are kept for validation and test; `always`: for training too."""


class FetchConfig(Config):
    """What fetching may cost d2i, and the hosts it asks; all defaults are ours."""

    mirror: Annotated[str, Field(pattern=r"^https?://.*\{(path|name|key)\}")] | None = None
    """Address to ask for pictures that the corpus names as files: `{path}` is `train/1.jpg`,
    `{name}` is `1.jpg`, `{key}` is `1`."""
    downloads: str | None = None
    """What img2dataset has downloaded before: a directory of its output, or `DIR/*` for several.
    URLs are looked up there first, and names of files that are not there as its keys."""
    contact: str | None = None
    """An address of yours, for the hosts that are asked: a mail address or a page."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Total deadline of one address, redirects and body included."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    """How long a host may take to be found and to take a connection."""
    min_rate_kib_s: float = Field(default=1.0, ge=0)
    """Bodies that come more slowly than this many KiB a second are given up (`too_slow`)."""
    shard_timeout_s: float = Field(default=3600.0, gt=0)
    """After so long, what is left of a planned shard fails (`shard_timeout`)."""
    max_image_mib: float = Field(default=20.0, gt=0)
    """Longest body or file that is read, in MiB, also after decompression."""
    num_threads: int = Field(default=16, gt=0)
    """Addresses that one worker asks at once, or files that it reads."""
    max_host_requests_per_s: float = Field(default=20.0, gt=0)
    """Requests a second to one host, over all workers of a job."""
    num_attempts: int = Field(default=3, gt=0)
    """How often an address is asked whose host is busy (429, 503)."""
    max_retry_after_s: float = Field(default=60.0, ge=0)
    """A host that wants longer peace than this is left to a later run."""
    num_host_failures: int = Field(default=3, gt=0)
    """Requests in a row that do not reach a host, or answers in a row that it is busy, with a wait
    after each, until it is left alone (`dead_host`)."""
    dead_host_s: float = Field(default=600.0, ge=0)
    """How long a host is then left alone."""
    num_trouble_hosts: int = Field(default=20, ge=0)
    """When nearly all of the last so many different hosts cannot be reached, or the mirror cannot,
    the job stops; 0: it goes on."""
    num_same_pictures: int = Field(default=10, ge=0)
    """One and the same picture under so many addresses is a `placeholder`; 0: it never is."""
    placeholder_sha256: tuple[Sha256, ...] = ()
    """Hashes of pictures that stand for what is gone (`placeholder`); the ledger has the hash of
    each picture."""
    decode_timeout_s: float = Field(default=20.0, gt=0)
    """How long the decoder may take for one picture, until it is killed."""
    max_decode_mib: int = Field(default=2048, ge=256)
    """The most memory that the decoder may take, in MiB."""

    @field_validator("contact")
    @classmethod
    def _contact_fits_a_header(cls, contact: str | None) -> str | None:
        if contact is not None and not (contact.isascii() and contact.isprintable()):
            raise ValueError("expected one line of ASCII, as it is sent in a header")
        return contact

    @property
    def max_image_bytes(self) -> int:
        """`max_image_mib` in bytes."""
        return int(self.max_image_mib * 2**20)


class Recipe(Config):
    """One reproducible setting of every stage, from corpus to scores."""

    name: str
    corpus: CorpusConfig = CorpusConfig()
    image: ImageConfig = ImageConfig()
    text: TextConfig = TextConfig()
    encoders: EncodersConfig
    backbone: BackboneConfig
    preprocess: PreprocessConfig = PreprocessConfig()
    fetch: FetchConfig = FetchConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _unset_means_what_the_loss_needs(self) -> Self:
        """Fill what guidance needs to be learned and drawn, where nobody said it."""
        if self.backbone.is_joint:
            if self.train.unidiffuser.loss == "joint":
                self._fill("train", "condition_dropout", 0.0)
            else:
                self._fill("sample", "unconditional", "empty_token")
        return self

    @model_validator(mode="after")
    def _an_empty_text_is_learned(self) -> Self:
        is_learned = self.train.unidiffuser.loss != "joint" or self.train.condition_dropout > 0
        wants_it = self.backbone.is_joint and self.sample.unconditional == "empty_token"
        if wants_it and not is_learned:
            raise ValueError(
                "sample.unconditional=empty_token asks for the text of '', which the joint loss "
                "never sees without train.condition_dropout; set that to 0.1, or leave "
                "sample.unconditional at true_uncond"
            )
        return self

    def _fill(self, section: str, name: str, value: float | str) -> None:
        """Give a setting its value, unless somebody did; it stays one that nobody set."""
        part = getattr(self, section)
        if name in part.model_fields_set:
            return
        filled = part.model_copy(update={name: value})
        filled.model_fields_set.discard(name)
        object.__setattr__(self, section, filled)

    @model_validator(mode="after")
    def _inception_score_needs_classes(self) -> Self:
        if self.metrics.extractor == "clip" and len(self.metrics.classes) == 1:
            raise ValueError("metrics.classes needs at least two prompts")
        return self


ConfigT = TypeVar("ConfigT", bound=Config)


def apply_settings(config: ConfigT, settings: Sequence[str]) -> ConfigT:
    """Return `config` with `a.b=value` settings applied and everything checked anew.

    A value is read as JSON where it is JSON (`3e-5`, `true`, `["a", "b"]`, `null`), else as text.

    Raises:
        ConfigError: On an unknown name (the nearest one is named), a wrong type or a bad form.
    """
    # What nobody set is decided anew: it may depend on what is set now.
    values = config.model_dump(exclude_unset=True)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {_cut(setting)}: expected NAME=VALUE, e.g. --set train.num_steps=100"
            )
        _assign(values, type(config), path, _parse(text))
    source = " ".join(f"--set {_cut(setting)}" for setting in settings).replace("\n", "\\n")
    return load_config(type(config), values, source=source)


def load_config(kind: type[ConfigT], values: dict[str, Any], *, source: str) -> ConfigT:
    """Build a config from plain values.

    Raises:
        ConfigError: One line that names `source`, the field, what was got and what was expected.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as err:
        first = err.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        # What two settings are together has no value of its own to show.
        got = f"{field} is {_shortened(first['input'])}: " if field else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{source}: {got}{message}; see 'd2i recipes show'") from err


def _shortened(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # What is nested without end is no value of a setting; as a text it is refused as one.
        return text


def _assign(values: dict[str, Any], kind: type[Config], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        _check_name(kind, parent, path)
        kind, values = _section(kind, parent, path), values.setdefault(parent, {})
    _check_name(kind, leaf, path)
    values[leaf] = value


def _section(kind: type[Config], name: str, path: str) -> type[Config]:
    annotation = kind.model_fields[name].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    raise ConfigError(f"--set {_cut(path)}: {name} holds a value, not a group; set {name} itself")


def _check_name(kind: type[Config], name: str, path: str) -> None:
    if name in kind.model_fields:
        return
    near = difflib.get_close_matches(name, kind.model_fields, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(kind.model_fields)}"
    raise ConfigError(f"--set {_cut(path)}: {kind.__name__} has no field '{_cut(name)}'; {hint}")
