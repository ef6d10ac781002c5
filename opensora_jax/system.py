"""The networks of one video diffusion system, and how a batch flows through them.

Training, feature encoding and sampling share this: which parts there are, how captions and pixels become what the
denoiser consumes, and the loss of a run. Parameters stay outside, in plain trees by part: "denoiser", "vae",
"text_encoder", and for Open-Sora 2.0 "text_encoder_2", CLIP, whose pooled vector is `y_vec`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from opensora_jax import captions
from opensora_jax.common.shapes import LatentShape
from opensora_jax.config import Part
from opensora_jax.diffusion.conditions import GivenFrames, TrainingConditions, encode_with_conditions, frame_weights
from opensora_jax.nn.params import Network
from opensora_jax.parallel.shard import constrain

# How pixels and latents enter a VAE under `context`: some rows (or else columns) a device, which trades borders with its
# neighbours before every convolution. The compiler's partitioner does that exactly, given where they begin.
ROWS = ("batch", None, "space", "space", None)
# Batch name → the argument of a denoiser that takes it; other names agree.
RENAMED = {"text_emb": "y"}


@dataclass(frozen=True)
class System:
    denoiser: Part | None = None
    vae: Part | None = None
    text_encoder: Part | None = None
    text_encoder_2: Part | None = None

    @cached_property
    def networks(self) -> dict[str, Network]:
        return {name: part.network() for name, part in self.parts.items()}

    @property
    def parts(self) -> dict[str, Part]:
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    @cached_property
    def takes(self) -> frozenset[str]:
        """Names of the denoiser's inputs."""
        return frozenset(self.inputs)

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the denoiser, for some small video."""
        return self.denoiser.module.inputs(self.denoiser.config, LatentShape(1, 2, 4, 4, 4))

    @cached_property
    def latent_channels(self) -> int:
        return self.inputs["x"].shape[-1]

    @cached_property
    def learned_null(self) -> bool:
        """Has the denoiser a null caption of its own? If not, the encoders' output for an empty prompt is the null."""
        if getattr(self.denoiser.config, "skip_y_embedder", False):  # captions arrive projected, past it
            return False
        paths = jax.tree_util.tree_leaves_with_path(self.networks["denoiser"].abstract)
        return any(getattr(path[-1], "key", None) == "null" for path, _ in paths)

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a video."""
        assert self.vae is not None
        return self.vae.module.latent_size(self.vae.config, frames, height, width)

    def encode_text(self, params, tokens, mask):
        """[B, L] ids → [B, L, D] features, float32; of CLIP its pooled vector [B, 1, D], for a denoiser that takes one.
        A denoiser that reads no text_mask reads padding too (2.0); where none is named, CLIP beside T5 tells it."""
        whole = self.text_encoder_2 is not None if self.denoiser is None else "text_mask" not in self.takes
        if whole:
            mask = None
        out = self.networks["text_encoder"](params, tokens, mask)
        if hasattr(out, "pooled"):
            y = None if self.denoiser is None else self.inputs.get("y")
            out = out.pooled[:, None] if y is not None and y.shape[1:2] == (1,) else out.tokens
        return out.astype(jnp.float32)

    def encode_pooled(self, params, tokens):
        """[B, L] ids of the second encoder → [B, D], float32."""
        return self.networks["text_encoder_2"](params, tokens).pooled

    def encode_video(self, params, video, key=None):
        """[B, T, H, W, 3] in [-1, 1] → latents; a draw of the posterior with a key, its mean without."""
        video = constrain(video, *ROWS)
        return self.networks["vae"](params, video, key, method="encode").astype(jnp.float32)

    def decode_video(self, params, latents, frames: int | None):
        latents = constrain(latents, *ROWS)
        return self.networks["vae"](params, latents, frames, method="decode").astype(jnp.float32)

    @cached_property
    def frames_of(self) -> Callable[[int], int]:
        """How many frames so many latent frames hold."""
        network, side = self.networks["vae"], self.latent_size(1, 256, 256)[1:]

        @lru_cache
        def frames_of(latents: int) -> int:
            z = jax.ShapeDtypeStruct((1, latents, *side, self.latent_channels), "float32")
            decode = lambda params, z: network(params, z, None, method="decode")
            return jax.eval_shape(decode, network.abstract, z).shape[1]

        return frames_of

    def features(self, batch: dict, frozen: dict, key=None, given=None) -> dict:
        """A batch with latents and text features, whether it brought them or pixels and tokens; with TrainingConditions
        (2.0) also the frames that the network is given."""
        batch = dict(batch)
        if "latents" not in batch:
            video = batch.pop("video")
            encode = lambda video: jax.lax.stop_gradient(self.encode_video(frozen["vae"], video, key))
            if isinstance(given, TrainingConditions):
                frames = self.latent_size(*video.shape[1:4])[0]
                kinds = given.draw(jax.random.fold_in(key, 1), len(video), frames)
                batch["latents"], batch["cond"] = encode_with_conditions(video, encode, kinds, given, frames)
                if given.skip_stills and frames > 1:
                    batch["frame_weights"] = frame_weights(batch["cond"][:, :, 0, 0, 0])
            else:
                batch["latents"] = encode(video)
            noisy = batch.pop("noisy", None)
            if noisy is not None and isinstance(given, GivenFrames):
                other = lambda: _with_noise(video, encode, jax.random.fold_in(key, 2))
                batch["reference"] = jax.lax.cond(noisy[0], other, lambda: batch["latents"])
        if "text_emb" not in batch and "text_tokens" in batch:
            features = self.encode_text(frozen["text_encoder"], batch.pop("text_tokens"), batch.get("text_mask"))
            batch["text_emb"] = jax.lax.stop_gradient(features)
        if "y_vec" not in batch and "text_tokens_2" in batch:
            pooled = self.encode_pooled(frozen["text_encoder_2"], batch.pop("text_tokens_2"))
            batch["y_vec"] = jax.lax.stop_gradient(pooled)
        return batch

    def conditioning(self, batch: dict) -> dict:
        """What of a batch the denoiser consumes, under its argument names."""
        named = {RENAMED.get(name, name): value for name, value in batch.items()}
        if "labels" in batch and "labels" not in self.takes:
            named["y"] = batch["labels"]
        if "ar" in self.takes and "ar" not in named:
            named["ar"] = named["height"] / named["width"]
        return {name: value for name, value in named.items() if name in self.takes and name not in ("x", "t")}

    def denoise(self, params, x, t, **conditioning) -> Any:
        return self.networks["denoiser"](params, x, t, **conditioning)

    def diffusion_loss(self, objective, objective_config, text_dropout: float, given=None, guidance: float = 4.0):
        """loss_fn(params, batch, key, frozen) for training/step.py; `given`: how 1.3 (GivenFrames) or 2.0
        (TrainingConditions) is given frames. Masks of other versions come with the batch. `guidance`: the scale that a
        network with distilled guidance is told."""

        def loss_fn(params, batch, key, frozen):
            key_vae, key_drop, key_loss, key_model = jax.random.split(key, 4)
            batch = self.features(batch, frozen, key_vae, given)
            batch, extra = captions.dropped(self, batch, frozen, key_drop, text_dropout)
            if getattr(self.denoiser.config, "drop_path", 0):
                extra["key"] = key_model
            if "guidance" in self.takes:
                extra["guidance"] = jnp.full(len(batch["latents"]), guidance, jnp.float32)
            if isinstance(given, GivenFrames):  # a condition for the whole batch, which the loader drew
                frames = ~batch.pop("x_mask")[0]
                batch = given.apply(batch | extra, frames, jax.random.fold_in(key, 4))
                extra |= {name: batch.pop(name) for name in ("drop_text", "mask_index")}
            known = self.conditioning(batch)

            def model_fn(x, t, **given):
                return self.denoise(
                    params, x, t, **{name: given.get(name, value) for name, value in known.items()}, **extra
                )

            fields = {name: batch[name] for name in ("latents", "x_mask", "frame_weights", *SIZES) if name in batch}
            loss, metrics = objective.loss(model_fn, fields, key_loss, objective_config)
            return loss, metrics

        return loss_fn

    def reconstruction_loss(self, cfg, perceptual=None):
        """loss_fn of task="vae": L1, optional L2, KL and perceptual terms on pixels; with latent_weight also L1 on the
        image latents that a temporal VAE gives back."""

        def loss_fn(params, batch, key, frozen):
            video = batch["video"]
            out = self.networks["vae"](params, video, key if cfg.sample_posterior else None)
            pixels, posterior = (out.x_rec, out.posterior) if hasattr(out, "x_rec") else out
            terms, loss = {}, 0.0
            if posterior is not None:
                terms["kl"] = posterior.kl().mean()
                loss += cfg.kl_weight * terms["kl"]
            if cfg.latent_weight:
                terms["latents"] = jnp.abs(out.x_z_rec - jax.lax.stop_gradient(out.x_z)).mean()
                loss += cfg.latent_weight * terms["latents"]
            if cfg.pixel_weight:
                terms |= _pixel_terms(pixels.astype(jnp.float32), video)
                loss += cfg.pixel_weight * terms["l1"] + cfg.l2_weight * terms["l2"]
            if perceptual is not None:
                terms["perceptual"] = perceptual(frozen["perceptual"], pixels, video).mean()
                loss += cfg.perceptual_weight * terms["perceptual"]
            return loss, terms

        return loss_fn


def _pixel_terms(pixels, video) -> dict:
    return {"l1": jnp.abs(pixels - video).mean(), "l2": jnp.square(pixels - video).mean()}


def _with_noise(video, encode, key):
    """1.3: latents of frames with a little noise, to be given in some batches."""
    key_share, key_noise = jax.random.split(key)
    share = jax.random.uniform(key_share, (len(video), 1, 1, 1, 1), minval=NOISY[0], maxval=NOISY[1])
    return encode((1 - share) * video + share * jax.random.normal(key_noise, video.shape, video.dtype))


NOISY = (0.1, 0.3)  # share of noise in noisy given frames, drawn between
PARTS = ("denoiser", "vae", "text_encoder", "text_encoder_2")
SIZES = ("fps", "height", "width", "num_frames")
