"""The settings of d2i: frozen, validated, stored as JSON, changed only by `--set a.b=value`.

Owns every field a recipe may hold. Must not import torch, ray or any stage.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from d2i.backbones import family_of, presets_of, recipe_problem
from d2i.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Precision = Literal["fp32", "bf16", "fp16"]
TrainPrecision = Literal["fp32", "bf16", "bf16_weights", "fp16_weights"]
WeightsKind = Literal["ema", "ema-short", "trained"]
Weighting = Literal["none", "min_snr_5", "sigma_sqrt", "cosmap"]


# The named linearizations (d2i.dialog), or the template of one turn.
_STRATEGY = r"^(hash|space|special|letters|[\s\S]*\{text\}[\s\S]*)$"
_SAMPLER = r"^(dpm_solver|ancestral|ancestral_posterior|pipeline|diffusers:[A-Za-z0-9]+Scheduler)$"
_MAX_SHOWN = 80
# The model times of the published networks, n = 1..1000.
NUM_NOISE_LEVELS = 1000
# The values in effect before a setting existed, for runs and evaluations started then.
LEGACY_DEFAULTS: dict[str, Any] = {
    "corpus.split_shares": None,
    "corpus.split_seed": None,
    "fetch.downloads": None,
    "image.max_upscale": None,
    "preprocess.format": None,
    "text.encode": "stored",
    "text.format": "line",
    "text.roles": "speaker",
    "train.text_encoder_precision": "fp32",
    "train.text_encoder_memory": "keep",
    "train.weighting": "none",
    "train.objective": "script",
    "train.latents": "draw",
    "train.ema_warmup": False,
    "train.short_ema_length": None,
    "sample.weights": "ema",
}


class Config(BaseModel):
    """A frozen group of settings that rejects unknown names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ImageConfig(Config):
    """Preparation of an image for the image encoder."""

    resolution: int = Field(default=256, gt=0, multiple_of=8)
    """Side in pixels of the centre square after LANCZOS resizing."""
    draft: bool = True
    """Halve JPEGs of four times the resolution or more while they are decoded. This is two to four
    times as fast and changes pixels by 0.2 to 0.5 of 255 on average (our default)."""
    min_side: int = Field(default=16, gt=0)
    """Images with a shorter side become failed rows (`too_small`)."""
    max_upscale: float | None = Field(default=None, ge=1)
    """In preprocessing, images whose shorter side times this is below the resolution become failed
    rows (`too_small`), as a network would learn the blur of upscaling; `None` sets no limit."""
    max_aspect: float = Field(default=20.0, ge=1.0)
    """Images whose longer side over shorter side is above this become failed rows
    (`odd_aspect`)."""
    max_megapixels: float = Field(default=90.0, gt=0)
    """Images whose header claims more become failed rows (`too_large`), and are not decoded."""

    def upscale_problem(self, width: int, height: int) -> str | None:
        """Return why an image of this size is beyond `max_upscale`; None if it is not."""
        shorter = min(width, height)
        # The quotient is rounded as the setting was, so the exact ratio is within the limit.
        if self.max_upscale is None or self.resolution / shorter <= self.max_upscale:
            return None
        return (
            f"{width}x{height} pixels: image.max_upscale={self.max_upscale:g} allows a resolution "
            f"up to {shorter * self.max_upscale:g}, got {self.resolution}; give a lower --set "
            "image.resolution, or --set image.max_upscale=null to allow any"
        )


class CorpusConfig(Config):
    """The definition of an instance (`d2i.corpora`); `None` keeps the corpus reader's default."""

    direction: Literal["answer", "first"] | None = None
    """`answer`: the image answers the turns before it. `first`: it precedes those after it."""
    own_turn: Literal["include", "exclude"] | None = None
    """Include the text of the image's own turn in its context, or exclude it."""
    images_in_turn: Literal["all", "first"] | None = None
    """Of several images in one turn, use all, or only the first."""
    repeated: Literal["all", "unique"] | None = None
    """Of an image that several dialogs share, use every occurrence, or only the first."""
    earlier_images: str | None = None
    """Text that stands for each image shared earlier, such as `[photo]`."""
    emoji: Literal["keep", "unicode", "drop"] | None = None
    """Keep a name such as `:raising_hands:`, replace it by its character, or drop it."""
    max_broken: float | None = Field(default=None, ge=0, le=1)
    """Maximum share of broken records in a split; above it the job stops."""
    split_shares: str | None = None
    """For your own chats in one file: the shares of train, valid and test, such as `0.8,0.1,0.1`;
    dialogs that show the same image stay together. `d2i preprocess --split` sets it."""
    split_seed: int | None = None
    """Seed that assigns dialogs to splits."""
    descriptions: str | None = None
    """File of captions that `d2i corpus --describe` made, for images without a description."""
    image_root: str | None = None
    """The directory of the images, if it is not the corpus's own; or plain tars of them,
    `images.tar` or `s3://bucket/images/*.tar`. For web URLs use `fetch.mirror`."""
    open_images_url: str | None = None
    """PhotoChat: the URL of an Open Images image, with `{photo_id}`."""

    def options(self) -> dict[str, Any]:
        """Return the corpus options that were set, by their names in `d2i.corpora`."""
        values = self.model_dump(exclude={"max_broken"})
        return {name: value for name, value in values.items() if value is not None}

    def divided(self, shares: str, seed: int) -> Self:
        """Return a copy of these settings for one unsplit file that is divided by shares."""
        return self.model_copy(update={"split_shares": shares, "split_seed": seed})


class TextConfig(Config):
    """Preparation of a conversation for the text encoder."""

    strategy: Annotated[str, Field(pattern=_STRATEGY)] = "hash"
    """`hash`, `space`, `special`, `letters` (paper, Figure 4), or a template with `{text}`."""
    empty_turns: Literal["drop", "keep"] = "drop"
    """Drop turns without text, or keep a mark for each."""
    speaker_runs: Literal["keep", "merge"] = "keep"
    """Keep turns in a row by one speaker apart, or merge them into one."""
    max_turns: int | None = Field(default=None, gt=0)
    """Maximum number of turns; `None` uses all that fit."""
    keep: Literal["end", "start"] = "end"
    """Side that is kept of a context longer than the window."""
    cut: Literal["token", "turn"] = "token"
    """Cut a context longer than the window within a turn, or between turns."""
    num_windows: int = Field(default=1, ge=1, le=4)
    """Windows of 77 tokens; more than one goes beyond the paper."""
    latents: Literal["full", "none"] = "full"
    """Store CLIP text latents in shards, or the token ids alone."""
    encode: Literal["stored", "on_the_fly"] = "stored"
    """Train on the text that shards store, or linearize and encode their dialogs while training.
    Then the other settings of `text` may differ from those that prepared the data."""
    format: Literal["line", "chat"] = "line"
    """`line`: the context as one line, linearized by `strategy`. `chat`: its turns as messages of
    the chat template of a pipeline's language model, for z-image and flux2-klein (our addition;
    docs/models.md, Chat format)."""
    roles: Literal["speaker", "permuted"] = "speaker"
    """Roles of the messages of a chat. `speaker`: `assistant` for the speaker who shares the image,
    `user` for all others. `permuted`, as a control: the same roles in a random order, drawn once
    for each sample."""


class DialogConfig(Config):
    """The part of a recipe that defines an instance, and how its context is written."""

    corpus: CorpusConfig = CorpusConfig()
    text: TextConfig = TextConfig()


class EncodersConfig(Config):
    """The frozen encoders, each a shipped name (`demo:vae`), directory, file or hub repository."""

    vae: str = "CompVis/stable-diffusion-v1-4/vae"
    """Our default is the public copy closest to the autoencoder of U-ViT and UniDiffuser
    (`autoencoder_kl.pth`). If unset, Stable Diffusion's own."""
    vae_kind: Literal["kl", "tiny"] = "kl"
    """The class of an autoencoder that is a single file. `kl`: diffusers AutoencoderKL. `tiny`:
    AutoencoderTiny, which has no log-variance. A directory names its class in `config.json`:
    AutoencoderKL, AutoencoderTiny, AutoencoderKLFlux2 or AutoencoderDC."""
    clip_image: str = "openai/clip-vit-base-patch32"
    clip_text: str | None = "openai/clip-vit-large-patch14"
    """If unset, Stable Diffusion's own, which is the same network; `None` for flow transformers,
    whose text is encoded while training: then shards hold neither token ids nor text latents."""
    text_prefix: str | None = None
    """UniDiffuser's Linear(768, 64), stored in the published `caption_decoder.pth`."""
    compute_batch_size: int = Field(default=32, gt=0)
    """Every encoder runs at this fixed, padded batch size, so that grouping changes no bit."""


def _known_backbone(name: str) -> str:
    try:
        family_of(name)
    except ConfigError as err:
        raise ValueError(str(err)) from err
    return name


SCRATCH = "scratch"
"""Value of `backbone.weights` for training from random weights."""


class BackboneConfig(Config):
    """The network and its initial weights. `None` keeps the published size."""

    name: Annotated[str, AfterValidator(_known_backbone)]
    weights: str | None = None
    """Initial weights: a file, a directory, a URL or `demo:backbone`; `scratch` for random ones.
    For networks of a diffusers pipeline, the directory of the whole pipeline, or its repository in
    the hub's local cache. Required for training; commands that load no network do not need it."""
    latent_scale: float | None = Field(default=None, gt=0)
    latent_size: int | None = Field(default=None, gt=0)
    patch_size: int | None = Field(default=None, gt=0)
    dim: int | None = Field(default=None, gt=0)
    depth: int | None = Field(default=None, gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    text_dim: int | None = Field(default=None, gt=0)
    num_text_tokens: int | None = Field(default=None, gt=0)
    """77 for each of `text.num_windows`; weights for one window are extended to it."""
    clip_dim: int | None = Field(default=None, gt=0)

    @property
    def is_random(self) -> bool:
        """True if training starts from random weights; older runs mean that by None."""
        return self.weights in (None, SCRATCH)

    def overrides(self) -> dict[str, Any]:
        """Return the sizes that differ from the published ones, for `build_backbone`."""
        sizes = self.model_dump(exclude={"name", "weights"})
        return {name: value for name, value in sizes.items() if value is not None}


class AdapterConfig(Config):
    """A low-rank adapter (LoRA): small matrices that are trained beside a frozen network."""

    kind: Literal["lora"] | None = None
    """`lora`, or `None` to train the whole network."""
    rank: int = Field(default=16, gt=0)
    """Rank of the two matrices beside each target."""
    alpha: int = Field(default=16, gt=0)
    """Their product is scaled by alpha / rank."""
    targets: tuple[str, ...] | str | None = None
    """The layers that get one: `script`, or `None`, for those that the backbone's published
    training script adapts; `all-linear` for every linear layer in a block; or names of layers, as
    peft matches them, with `*` for any characters."""

    @field_validator("targets")
    @classmethod
    def _one_word_or_several_layers(cls, targets: tuple[str, ...] | str | None) -> object:
        if isinstance(targets, str) and targets not in ("script", "all-linear"):
            raise ValueError('expected script, all-linear, or a list of layers such as ["to_q"]')
        return targets


class OptimConfig(Config):
    """AdamW (paper, section 3.3)."""

    lr: float = Field(default=3e-5, gt=0)
    weight_decay: float = Field(default=0.03, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.9)
    eps: float = Field(default=1e-8, gt=0)
    num_warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up, then constant."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Larger gradients are clipped to this norm; `None`, as published, clips none."""


class UniDiffuserLossConfig(Config):
    """The training loss of UniDiffuser (its paper, equation 1); U-ViT has one loss only."""

    loss: Literal["joint", "t2i"] = "joint"
    """`joint` predicts latent, CLIP image and text; `t2i` the first two, given a clean text."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """A weight for each predicted part; `None` is the mean over all predicted numbers together."""
    data_type: Literal[0, 1] = 1
    """UniDiffuser-v1's data type: 1 curated, 0 web."""

    @model_validator(mode="after")
    def _each_part_has_a_weight(self) -> Self:
        num_parts = 3 if self.loss == "joint" else 2
        if self.weights is not None and len(self.weights) != num_parts:
            raise ValueError(
                f"the {self.loss} loss has {num_parts} parts, got {len(self.weights)} weights; "
                f"give {num_parts}"
            )
        return self


class TrainConfig(Config):
    """Everything that determines the numbers of one training run, and what is kept of it."""

    num_steps: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)
    """Samples per optimizer step over all ranks, for any number of ranks."""
    micro_batch_size: int = Field(gt=0)
    """Maximum number of samples in one forward pass of a rank."""
    optim: OptimConfig = OptimConfig()
    unidiffuser: UniDiffuserLossConfig = UniDiffuserLossConfig()
    objective: Literal["script", "report"] = "script"
    """Distribution of the noise levels: that of the published training script, or that of the
    backbone's technical report where it says another (docs/flow-transformers.md, Noise levels)."""
    weighting: Weighting = "none"
    """Weight of each noise level in the loss: `none`, as published for every backbone here;
    `min_snr_5` (Min-SNR, Hang et al. 2023, with gamma 5) for networks that predict noise;
    `sigma_sqrt` or `cosmap` (Esser et al. 2024) for flow transformers."""
    latents: Literal["draw", "mean"] = "draw"
    """Train on latents drawn from the autoencoder's distribution, again at every step, or on its
    mean. If unset, as published: drawn, but the mean for flow transformers."""
    precision: TrainPrecision = "bf16"
    """`bf16`: precision of the network's products under torch's autocast, as in the published
    programs: weights, gradients and their sums over micro batches and ranks stay in float32.
    `bf16_weights` and `fp16_weights` hold the whole network and its gradients in half precision,
    which halves their memory and rounds those sums (our addition; docs/fidelity.md). With an
    adapter, `bf16` also holds the frozen network in bfloat16."""
    text_encoder_precision: Precision = "fp32"
    """Precision of a pipeline's text encoders while training. If unset, `bf16` for flow
    transformers, whose encoders are language models."""
    text_encoder_memory: Literal["keep", "offload", "free"] = "keep"
    """Memory of a pipeline's text encoders while training. `keep`: they stay on the accelerator.
    `offload`: they are in the CPU's memory, and moved to the accelerator and back for every batch,
    which is then read between steps, not ahead.
    `free`: every rank encodes all texts first, into a file in `TMPDIR`, and then frees them."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: sharding of optimizer state, gradients and weights over the ranks. A single rank
    has nothing to shard, and uses stage 0 with weights in float32, or on a CPU, unless `--zero`
    says otherwise."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass: a third more work, less memory."""
    compile: bool = False
    """Let `torch.compile` fuse the operations between the matrix products of a block: faster steps
    after a minute of compiling. Needs a C++ compiler and, on a GPU, Triton."""
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose text is replaced by that of '' (classifier-free guidance). If unset, 0
    for UniDiffuser's joint loss, which learns its unconditional half at t^y = T."""
    ema_rate: float = Field(default=0.9999, ge=0, lt=1)
    """Maximum decay per step of the exponential moving average of the weights (EMA)."""
    ema_warmup: bool = True
    """Use a smaller decay at first, as diffusers' EMAModel does: after step k, 0 for k = 1, else
    min(ema_rate, k / (9 + k)); the averaged weights are then a tenth of the steps old. Without it,
    a short training's average is still mostly the initial weights: 92 % after 850 steps."""
    short_ema_length: float | None = Field(default=0.05, gt=0, lt=0.09)
    """Length of a second, shorter average, as a share of the steps so far (EDM2's sigma_rel; the
    warm-up's is 0.09). It takes 4 bytes per parameter, sharded like the EMA; `None` keeps none."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    order: Literal["global", "blocked"] = "global"
    """`global`: all samples are shuffled. `blocked`: shards are shuffled, then the samples within a
    window of them, for remote shards."""
    num_window_shards: int = Field(default=16, gt=0)
    """With `blocked`: the number of shards in a window."""
    num_reader_threads: int = Field(default=2, gt=0)
    """Threads per rank that prefetch batches and draw their random numbers."""
    num_checkpoint_steps: int = Field(default=1000, gt=0)
    """Steps between two checkpoints."""
    num_checkpoints_kept: int = Field(default=2, gt=0)
    """Number of newest checkpoints that are kept."""
    num_log_steps: int = Field(default=10, gt=0)
    """Steps between two lines of `metrics.jsonl`."""
    num_validation_steps: int = Field(default=500, gt=0)
    """Steps between two losses on fixed validation instances, if the data has any."""
    num_validation_samples: int = Field(default=256, gt=0)
    """Maximum number of those instances."""
    record_keys: bool = False
    """Record the keys of every step on each rank, as evidence of the data order."""
    num_sample_steps: int | None = Field(default=None, gt=0)
    """Steps between two images of fixed validation dialogs; `None` generates none."""
    wandb_project: str | None = Field(default=None, min_length=1)
    """Weights & Biases project that also receives the run's metrics, under the account logged in
    (`wandb login`, or `WANDB_MODE=offline`); `None` sends nothing anywhere."""

    @field_validator("precision", mode="before")
    @classmethod
    def _read_fp16_of_older_runs(cls, value: object) -> object:
        return "fp16_weights" if value == "fp16" else value

    @model_validator(mode="after")
    def _sample_images_need_checkpoints(self) -> Self:
        if self.num_sample_steps and self.num_sample_steps % self.num_checkpoint_steps:
            raise ValueError(
                f"num_sample_steps must be a multiple of num_checkpoint_steps "
                f"({self.num_checkpoint_steps}), as images are generated from checkpoints"
            )
        return self

    def accumulation(self, world_size: int) -> tuple[int, int]:
        """Split the global batch over ranks.

        Returns:
            The micro batch of one rank and the number of micro batches per step:
            `world_size * micro_batch * num_micro_batches == global_batch_size`.

        Raises:
            ConfigError: If the global batch is not a multiple of the number of ranks.
        """
        if self.global_batch_size % world_size:
            raise ConfigError(
                f"train.global_batch_size is {self.global_batch_size}, which {world_size} ranks "
                "cannot split evenly; expected a multiple of the number of ranks; change "
                "--num-accelerators or --set train.global_batch_size"
            )
        per_rank = self.global_batch_size // world_size
        micro = max(m for m in range(1, self.micro_batch_size + 1) if per_rank % m == 0)
        return micro, per_rank // micro


class SampleConfig(Config):
    """Image generation with the network."""

    weights: WeightsKind = "ema"
    """Kind of a run's weights: `ema`, the shorter average `ema-short`, or `trained`, those that
    the optimizer updates. Ignored for other systems, which have only one kind of weights."""
    sampler: Annotated[str, Field(pattern=_SAMPLER)] = "dpm_solver"
    """`dpm_solver` (as published), `ancestral` or `ancestral_posterior` (the paper's Algorithm 2
    with sigma_n^2 = beta_n or the posterior variance, 1000 steps), or one of diffusers' schedulers,
    such as `diffusers:DPMSolverMultistepScheduler`. For a diffusers pipeline `pipeline`, the
    scheduler in its own files, or, for Stable Diffusion, another of diffusers' with its numbers."""
    num_steps: int = Field(default=50, gt=0)
    guidance_scale: float = Field(default=2.0, ge=1)
    """1 + s of `cond + s (cond - uncond)`: 2 for U-ViT, 8 for UniDiffuser."""
    unconditional: Literal["true_uncond", "empty_token"] = "true_uncond"
    """Text of UniDiffuser's unconditional half: pure noise (as published), or that of ''. If unset,
    the latter for the `t2i` loss, which learns no other."""
    data_type: Literal[0, 1] = 1
    """UniDiffuser-v1's data type: 1 curated (as published), 0 web."""
    precision: Precision = "fp32"
    """Precision of the network's products under torch's autocast; weights and solver stay in
    float32. The published programs sample under autocast, which GPUs are fast at; `bf16` changes a
    sample by about 1e-2, `fp16` by 1e-3 (docs/models.md, Sampling)."""
    compute_batch_size: int = Field(default=50, gt=0)
    """The network runs at this fixed, padded batch size, so that grouping changes no bit."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    pipeline: dict[str, int | float | str] = {}
    """Call arguments of a diffusers pipeline, for systems that are one; all other arguments keep
    the pipeline's defaults."""

    @model_validator(mode="after")
    def _ancestral_sampling_takes_all_steps(self) -> Self:
        if self.sampler.startswith("ancestral") and self.num_steps != NUM_NOISE_LEVELS:
            raise ValueError(
                f"sampler {self.sampler} visits all {NUM_NOISE_LEVELS} noise levels, got "
                f"num_steps={self.num_steps}; set num_steps={NUM_NOISE_LEVELS}"
            )
        return self


class MetricsConfig(Config):
    """Inputs of the scores: feature extractor, text tower and image size."""

    extractor: Literal["inception", "clip"] = "inception"
    """FID, KID and IS features: torch-fidelity's Inception, or the recipe's CLIP image encoder."""
    extractor_weights: str | None = None
    """Inception's weights file; `None` uses torch-fidelity's own cache."""
    extractor_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = None
    """First digits of the file's sha256; `None` expects those of the published file. With any other
    weights, FID and IS are not comparable with published ones."""
    clip_text: str | None = "openai/clip-vit-base-patch32"
    """The text tower that shares its space with `encoders.clip_image`, for CLIP-T, retrieval and
    prompts; `None` does without them."""
    resolution: int | None = Field(default=None, gt=0)
    """Side at which images are scored; `None` uses the one they are generated at. Scores of systems
    that generate at different sizes are comparable only at one resolution."""
    classes: tuple[str, ...] = ()
    """With `clip`: the prompts whose zero-shot probabilities give the Inception Score."""


class PreprocessConfig(Config):
    """Planning of the records, and content of the shards."""

    choose: Literal["hash", "reservoir", "first"] = "hash"
    """Instances that `--limit` keeps: by a seeded hash of their keys, independent of the order of
    reading; drawn at random while reading; or the first ones read."""
    num_samples_per_shard: int = Field(default=1000, gt=0)
    encoder_precision: Precision = "fp32"
    """Precision of the frozen encoders' products in preprocessing, under torch's autocast; weights
    stay float32. `bf16` changes about 1 % of the moments' size, `fp16` 0.3 % (our measurement,
    benchmarks/); it can only pay off on GPUs. Training and evaluation always encode in float32."""
    keep_images: Literal["auto", "always"] = "auto"
    """`auto`: source bytes are kept for validation and test; `always`: for training too."""
    format: Literal[2] | None = None
    """Version of the format of shards; `None`: 1 where that can hold the arrays, else 2, in which
    shards declare what they hold."""


class FetchConfig(Config):
    """Limits of fetching, for d2i and for the hosts it contacts; all are our defaults."""

    mirror: Annotated[str, Field(pattern=r"^https?://.*\{(path|name|key)\}")] | None = None
    """URL to request images from that the corpus names as files: `{path}` is `train/1.jpg`,
    `{name}` is `1.jpg`, `{key}` is `1`."""
    downloads: str | None = None
    """Earlier downloads of img2dataset: a directory of its output, or `DIR/*` for several. URLs are
    looked up there first; image files that are missing are looked up there by their key."""
    contact: str | None = None
    """Your contact for site owners, sent in the User-Agent: an email address or a web page."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Total deadline of one URL, redirects and body included."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    """Maximum time to resolve a host and connect to it."""
    min_rate_kib_s: float = Field(default=1.0, ge=0)
    """Bodies that arrive more slowly than this many KiB a second are aborted (`too_slow`)."""
    shard_timeout_s: float = Field(default=3600.0, gt=0)
    """After this time, the rest of a planned shard fails (`shard_timeout`)."""
    max_image_mib: float = Field(default=20.0, gt=0)
    """Maximum size of a body or file, in MiB, also after decompression."""
    num_threads: int = Field(default=16, gt=0)
    """URLs that one worker requests at once, or files that it reads."""
    max_host_requests_per_s: float = Field(default=20.0, gt=0)
    """Rate limit: requests per second to one host, over all workers of a job."""
    num_attempts: int = Field(default=3, gt=0)
    """Maximum number of attempts at a URL whose host is busy (429, 503)."""
    max_retry_after_s: float = Field(default=60.0, ge=0)
    """A host that requests a longer backoff than this is left to a later run."""
    num_host_failures: int = Field(default=3, gt=0)
    """Requests in a row that do not reach a host, or busy responses in a row, with a backoff after
    each, until the host is skipped (`dead_host`)."""
    dead_host_s: float = Field(default=600.0, ge=0)
    """Time for which a dead host is then skipped."""
    num_trouble_hosts: int = Field(default=20, ge=0)
    """Outage: the job stops when nearly all of the last this many different hosts cannot be
    reached, or the mirror cannot; 0 never stops."""
    num_same_pictures: int = Field(default=10, ge=0)
    """An image served from this many distinct URLs is a `placeholder`; 0 turns the check off."""
    placeholder_sha256: tuple[Sha256, ...] = ()
    """Hashes of images that replace deleted ones (`placeholder`); the ledger has the hash of each
    image."""
    decode_timeout_s: float = Field(default=20.0, gt=0)
    """Maximum time for decoding one image, after which the decoder is killed."""
    max_decode_mib: int = Field(default=2048, ge=256)
    """Maximum memory of the decoder, in MiB."""

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
    adapter: AdapterConfig = AdapterConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    fetch: FetchConfig = FetchConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _fits_its_family(self) -> Self:
        """Fill in what the family needs where nothing is set, and ask it what is wrong."""
        for setting, value in presets_of(self.backbone.name).unset(self).items():
            section, _, name = setting.partition(".")
            self._fill(section, name, value)
        if problem := recipe_problem(self):
            raise ValueError(problem)
        return self

    def _fill(self, section: str, name: str, value: float | str) -> None:
        """Set a value unless the user set one; the field still counts as unset."""
        part = getattr(self, section)
        if name in part.model_fields_set:
            return
        filled = part.model_copy(update={name: value})
        filled.model_fields_set.discard(name)
        object.__setattr__(self, section, filled)

    @model_validator(mode="after")
    def _inception_score_needs_classes(self) -> Self:
        if self.metrics.extractor == "clip" and len(self.metrics.classes) == 1:
            raise ValueError(
                "metrics.classes needs at least two prompts, as IS compares classes; got one"
            )
        return self


_OTHER_OPTIMIZERS = "d2i trains with AdamW only (others are not yet checked on a GPU)"
_QUANTISED_BASES = (
    "quantised base models are not supported yet (with an adapter, train.precision=bf16 holds the "
    "base in bfloat16)"
)
# Settings of other tools that people look for here, and the reason why d2i has none.
_UNSUPPORTED: dict[type[Config], dict[str, str]] = {
    TrainConfig: {"optimizer": _OTHER_OPTIMIZERS},
    OptimConfig: dict.fromkeys(("name", "type"), _OTHER_OPTIMIZERS),
    BackboneConfig: dict.fromkeys(
        ("quantize", "quantization", "load_in_4bit", "load_in_8bit"), _QUANTISED_BASES
    ),
}

ConfigT = TypeVar("ConfigT", bound=Config)


def apply_settings(config: ConfigT, settings: Sequence[str]) -> ConfigT:
    """Return `config` with `a.b=value` settings applied, and everything validated again.

    A value is parsed as JSON if it is JSON (`3e-5`, `true`, `["a", "b"]`, `null`), else as text.

    Raises:
        ConfigError: On an unknown name (it suggests the nearest one), a wrong type or a bad form.
    """
    # Unset fields are filled again: they may depend on what is set now.
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
        ConfigError: One line that names `source`, the field, the value and what was expected.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as err:
        raise ConfigError(f"{source}: {_problem(kind, err)}; see 'd2i recipes show'") from err


def _problem(kind: type[Config], err: ValidationError) -> str:
    """Describe one of the errors; an unknown name first, as it may be a missing one mistyped."""
    errors = err.errors()
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{field} is missing; expected a value for it"
    if first["type"] == "extra_forbidden":
        *parents, leaf = (str(part) for part in first["loc"])
        for parent in parents:
            kind = _section(kind, parent, field)
        return f"{_cut(field)}: {_unknown_name(kind, leaf, first['input'])}"
    # An error about two settings together has no single value to show.
    got = f"{field} is {_shortened(first['input'])}: " if field else ""
    return got + first["msg"].removeprefix("Value error, ")


def _shortened(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # Endless nesting is not a setting's value; taken as text, it is refused.
        return text


def _assign(values: dict[str, Any], kind: type[Config], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        _check_name(kind, parent, path, value)
        kind, values = _section(kind, parent, path), values.setdefault(parent, {})
    _check_name(kind, leaf, path, value)
    values[leaf] = value


def _section(kind: type[Config], name: str, path: str) -> type[Config]:
    annotation = kind.model_fields[name].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    raise ConfigError(
        f"--set {_cut(path)}: {name} is a single value, not a group; set {name} itself"
    )


def _check_name(kind: type[Config], name: str, path: str, value: Any) -> None:
    if name not in kind.model_fields:
        raise ConfigError(f"--set {_cut(path)}: {_unknown_name(kind, name, value)}")


def _unknown_name(kind: type[Config], name: str, value: Any) -> str:
    if reason := _UNSUPPORTED.get(kind, {}).get(name):
        return f"got {_shortened(value)}; {reason}; leave it out"
    near = difflib.get_close_matches(name, kind.model_fields, n=1)
    hint = (
        f"did you mean '{near[0]}'?" if near else f"its fields are {', '.join(kind.model_fields)}"
    )
    return f"{kind.__name__} has no field '{_cut(name)}'; {hint}"
