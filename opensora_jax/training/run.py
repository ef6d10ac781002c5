"""The configuration of a training run; configs/*.py fill it, train.py reads it."""

from dataclasses import dataclass, field

from opensora_jax.common.errors import UserError
from opensora_jax.data.loader import DataConfig
from opensora_jax.diffusion.conditions import GivenFrames
from opensora_jax.parallel.mesh import MeshConfig
from opensora_jax.training.checkpoint import CheckpointConfig
from opensora_jax.training.optimizer import OptimizerConfig

PRECISIONS = ("float32", "tensorfloat32", "bfloat16", "default")


@dataclass(frozen=True)
class TextConfig:
    """How captions become features when the data does not bring them."""

    tokenizer: str = ""  # a folder; empty: the one of `pipeline`
    tokenizer_2: str = ""  # of the second encoder (Open-Sora 2.0)
    max_length: int = 300
    dropout: float = 0.1  # share of captions replaced by the null caption, for classifier-free guidance
    guidance: float = 4.0  # the scale told to a network with distilled guidance (FLUX.1-dev); others take none


@dataclass(frozen=True)
class VaeLossConfig:
    """Loss of task="vae"."""

    kl_weight: float = 1e-6
    sample_posterior: bool = True  # False: an autoencoder of posterior means, which small networks learn faster
    pixel_weight: float = 1.0  # of the L1 on pixels; 0: the image decoder is not run
    l2_weight: float = 0.0  # beside the L1 of the references
    latent_weight: float = 0.0  # of the L1 on image latents through the temporal VAE: the first stages of 1.2's VAE
    perceptual_weight: float = 0.1
    perceptual_weights: str = ""  # a converted LPIPS folder; empty: no perceptual term
    calibrate_batches: int = (
        16  # the export sets latent shift and scale to the statistics of so many batches; 0: keeps them
    )


@dataclass(frozen=True)
class ConditionsConfig:
    """Frames that training gives to networks that take them beside the noise. Which, Open-Sora 1.3 draws a batch from
    data.mask_types; 2.0 draws a sample from `kinds`. Masks of 1.1 and 1.2 are data.mask_ratios."""

    kinds: dict[str, float] = field(default_factory=dict)  # of diffusion.conditions.KINDS, by weight: needs pixels
    skip_stills: bool = False  # the loss leaves out given stills
    drop: dict[str, float] = field(default_factory=lambda: dict(GivenFrames().drop))  # 1.3: what a batch loses
    weight: float = 1.0  # 1.3: of given frames in the loss


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 10
    tensorboard: bool = True
    wandb_project: str = ""
    sample_every_steps: int = 0  # 0: never
    sample_prompts: tuple[str, ...] = ()
    profile_steps: tuple[int, ...] = ()  # (first, last): a profiler trace in WORKDIR/profile


@dataclass(frozen=True)
class RunConfig:
    task: str = "diffusion"  # or "vae"
    seed: int = 42
    steps: int = 1000
    model: dict = field(default_factory=dict)  # family, preset and fields of that network's Config
    vae: dict = field(default_factory=dict)  # empty: data brings latents
    text_encoder: dict = field(default_factory=dict)  # empty: data brings text features
    text_encoder_2: dict = field(default_factory=dict)  # Open-Sora 2.0: CLIP beside T5
    pipeline: str = ""  # a pipeline folder that gives every part not described above, weights included
    text: TextConfig = field(default_factory=TextConfig)
    objective: dict = field(default_factory=lambda: {"name": "rectified_flow", "preset": "V1_2"})
    sampling: dict = field(default_factory=dict)  # defaults that the exported pipeline samples with
    vae_loss: VaeLossConfig = field(default_factory=VaeLossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float = 0.9999
    ema_start_steps: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    precision: str = "default"  # of matmuls in float32; bf16 compute is the network's own dtype
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    init_from: str = ""  # weights to start from: a pipeline folder or WORKDIR[@step]
    init_into: str = (
        ""  # the part of the network that init_from fills (spatial: an image VAE in a video VAE); empty: all
    )
    resume_from: str = ""  # another run to continue, optimizer and data position included
    max_bad_steps: int = 20  # consecutive non-finite steps before the run stops
    dry_run: bool = False

    def __post_init__(self):
        if self.task not in ("diffusion", "vae"):
            raise UserError(f"config.task={self.task!r} is unknown; choose diffusion or vae")
        if self.precision not in PRECISIONS:
            raise UserError(f"config.precision={self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
        if self.init_from and self.resume_from:
            raise UserError("config.init_from and config.resume_from exclude each other: weights alone, or a whole run")
