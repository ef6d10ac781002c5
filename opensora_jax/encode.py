"""python -m opensora_jax.encode --config=configs/debug.py --out=DIR [--config.data.source=clips.csv ...]

Clips → VAE latents and text features as ArrayRecord shards, so that training needs neither encoder. Reads the data
section, the pipeline and the mesh of a run's configuration; every clip is written once, at its bucket's shape. An
interrupted job goes on after its last whole shard.
"""

import json
import sys

from opensora_jax import config
from opensora_jax.common.errors import UserError, guarded


def arguments(argv=None):
    parser = config.Parser("encode", __doc__)
    parser.add_argument("--config", metavar="FILE", help="a run's configuration: data, pipeline, mesh")
    parser.add_argument("--out", metavar="DIR", help="folder for the shards (local, gs://, s3://)")
    parser.add_argument("--shard_size", type=int, default=1024, help="records a shard, about (1024)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of stored arrays (bfloat16)"
    )
    parser.add_argument("--sample_posterior", action="store_true", help="draw latents from the posterior, not its mean")
    return parser.parse(argv)


def main(argv=None) -> int:
    args, overrides = arguments(argv)
    tree = config.load(args.config, overrides)
    if not args.out:
        raise UserError("--out=DIR is missing; it is where the shards go")

    import jax
    from etils import epath

    from opensora_jax import __version__
    from opensora_jax.common import log
    from opensora_jax.common.progress import Progress
    from opensora_jax.data.loader import make_loader
    from opensora_jax.data.records import ShardWriter, write_manifest
    from opensora_jax.parallel import runtime, shard
    from opensora_jax.parallel.mesh import make_mesh
    from opensora_jax.pipeline import assemble
    from opensora_jax.trainer import Trainer
    from opensora_jax.training.run import RunConfig

    cfg = config.build(RunConfig, tree | {"task": "diffusion"}, "config")
    runtime.start()
    process, count = jax.process_index(), jax.process_count()
    log.setup(process)
    runtime.set_precision(cfg.precision)
    layout = shard.layout(make_mesh(cfg.mesh), cfg.mesh.rules, cfg.mesh.attention)
    if shard.rows_of_process(layout) != (process, count):
        raise UserError("encoding shares out clips alone; set config.mesh.context and config.mesh.tensor to 1")
    with shard.use(layout):
        assembly = assemble(cfg)
        trainer = Trainer(cfg, assembly, layout)
        missing = [name for name in ("vae", "text_encoder") if name not in assembly.system.parts]
        if missing:
            raise UserError(f"config.pipeline has no {' and no '.join(missing)}; encoding needs both")
        writer = ShardWriter(args.out, records_per_shard=1 << 40, prefix=f"latents-{process:03d}")
        journal = Journal(epath.Path(args.out) / f".encode-{process:03d}.json")
        start, seen = journal.resume(writer.shards_done)
        loader = make_loader(
            trainer.data_config(whole=True), start_step=start, process_index=process, process_count=count
        )
        if loader.latents:
            raise UserError(f"{cfg.data.source} already holds latents; there is nothing to encode")
        frozen = assembly.frozen(layout)
        total = loader.plan.steps_per_epoch
        encode = make_encoder(assembly.system, args.sample_posterior, cfg.seed)
        pending: list[str] = []
        with writer, Progress("encoding", total, start=start, quiet=process > 0) as bar:
            for step in range(start, total):
                batch, info = next(loader)
                out = encode(frozen, trainer.place(batch), step)
                for record in records_of(batch, info, local_rows(out), args.dtype):
                    if record["id"] not in seen:  # the last batch of a bucket is filled up with clips that were there
                        seen.add(record["id"])
                        pending.append(record["id"])
                        writer.write(record)
                if len(pending) >= args.shard_size or step + 1 == total:
                    journal.add(step + 1, pending)
                    pending = []
                    writer.close()
                bar.update(note=f"{len(seen)} clips")
        loader.close()
    runtime.barrier("encode")
    if process == 0:
        facts = {
            "vae": assembly.system.parts["vae"].describe(),
            "text_encoder": assembly.system.parts["text_encoder"].describe(),
        }
        manifest = write_manifest(args.out, encoded_by=__version__, pipeline=cfg.pipeline, **facts)
        log.logger.info("%d records in %s", manifest["records"], args.out)
    return 0


def make_encoder(system, sample: bool, seed: int):
    import jax

    @jax.jit
    def encode(frozen, batch, step):
        key = jax.random.fold_in(jax.random.key(seed), step) if sample else None
        out = system.features(batch, frozen, key)
        return {name: out[name] for name in ("latents", "text_emb", "text_mask", "y_vec") if name in out}

    return encode


def local_rows(out: dict) -> dict:
    """This process's rows of global arrays, in order, each once."""
    import numpy as np

    def gather(array):
        shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return {name: gather(array) for name, array in out.items()}


def records_of(batch: dict, info, out: dict, dtype: str):
    from opensora_jax.weights.store import numpy_dtype

    stored = numpy_dtype(dtype)
    for row, name in enumerate(info.ids):
        length = max(1, int(out["text_mask"][row].sum()))
        yield {
            "id": name,
            "text": batch["text"][row],
            "num_frames": int(batch["num_frames"][row]),
            "fps": float(batch["fps"][row]),
            "height": int(batch["height"][row]),
            "width": int(batch["width"][row]),
            "latents": out["latents"][row].astype(stored),
            "text_emb": out["text_emb"][row].astype(stored),
            "text_mask": out["text_mask"][row].astype("int32"),
            "meta": {"tokens": length},
        } | ({"y_vec": out["y_vec"][row].astype(stored)} if "y_vec" in out else {})


class Journal:
    """Which step follows each finished shard. An entry is written before its shard gets its name, so that after any
    kill the number of finished shards says which entries count."""

    def __init__(self, path):
        self.path = path
        self.entries: list[dict] = json.loads(path.read_text()) if path.exists() else []

    def resume(self, shards_done: int) -> tuple[int, set[str]]:
        self.entries = self.entries[:shards_done]
        if len(self.entries) < shards_done:
            raise UserError(f"{self.path.parent} holds shards of another job; choose an empty folder for --out")
        return (self.entries[-1]["next_step"] if self.entries else 0), {
            i for entry in self.entries for i in entry["ids"]
        }

    def add(self, next_step: int, ids: list[str]) -> None:
        self.entries.append({"next_step": next_step, "ids": ids})
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.entries))
        partial.replace(self.path)


def run() -> None:
    sys.exit(guarded(main))


if __name__ == "__main__":
    run()
