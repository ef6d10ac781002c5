"""python -m opensora_jax.train --config=configs/stage3.py --workdir=runs/stage3 [--config.key=value ...]

One run, top to bottom: configuration → mesh → data → state → step → loop. The same command on a laptop, a TPU pod or a
GPU cluster; run again, it goes on where it was. `--config.dry_run=True` compiles and reports, touching no data.
"""

import contextlib
import json
import os
import sys

from opensora_jax import config
from opensora_jax.common.errors import UserError, guarded


def arguments(argv=None):
    parser = config.Parser("train", __doc__)
    parser.add_argument("--config", metavar="FILE[:variant]", help="a configuration file, e.g. configs/debug.py")
    parser.add_argument(
        "--workdir", metavar="DIR", help="where checkpoints, metrics and samples go (local, gs://, s3://)"
    )
    parser.add_argument(
        "--export", metavar="DIR", help="at the end (or at once, when all steps are done) write a pipeline folder"
    )
    parser.add_argument("--export_dtype", metavar="T", default="bfloat16", help="dtype of exported weights (bfloat16)")
    return parser.parse(argv)


def main(argv=None) -> int:
    args, overrides = arguments(argv)
    tree = config.load(args.config, overrides)
    if tree.get("dry_run"):
        from opensora_jax.plan.dry_run import dry_run

        return dry_run(tree)
    if not args.workdir:
        raise UserError("--workdir=DIR is missing; it is where the run lives, e.g. --workdir=runs/first")

    import jax
    from etils import epath

    from opensora_jax.common import log
    from opensora_jax.data.loader import make_loader
    from opensora_jax.parallel import runtime, shard
    from opensora_jax.parallel.mesh import make_mesh
    from opensora_jax.pipeline import assemble
    from opensora_jax.trainer import Trainer
    from opensora_jax.training import hooks, optimizer
    from opensora_jax.training.checkpoint import Checkpoints
    from opensora_jax.training.metrics import MetricWriter
    from opensora_jax.training.run import RunConfig
    from opensora_jax.training.state import abstract_state, init_state

    # ---- configuration -------------------------------------------------------------------------------------------
    cfg = config.build(RunConfig, tree, "config")
    runtime.start()
    log.setup(jax.process_index())
    runtime.set_precision(cfg.precision)
    workdir = writable(epath.Path(args.workdir))
    checkpoints = Checkpoints(workdir, cfg.checkpoint)
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(json.dumps(config.to_plain(cfg), indent=2) + "\n")

    # ---- mesh ----------------------------------------------------------------------------------------------------
    layout = shard.layout(make_mesh(cfg.mesh), cfg.mesh.rules, cfg.mesh.attention)
    with shard.use(layout), contextlib.ExitStack() as cleanup:
        # ---- data: what is wrong with it shows before anything is loaded -----------------------------------------
        assembly = assemble(cfg)
        trainer = Trainer(cfg, assembly, layout)
        network = trainer.trained_network()
        share, shares = shard.rows_of_process(layout)
        loader = make_loader(trainer.data_config(), process_index=share, process_count=shares)
        cleanup.callback(loader.close)
        needs_frozen = trainer.needs_frozen(loader)

        # ---- optimizer, state ------------------------------------------------------------------------------------
        tx = optimizer.make(cfg.optimizer, cfg.steps, trainer.trainable)
        abstract = abstract_state(network, tx, layout, offload=cfg.optimizer.offload)
        state, _, cursor, how = checkpoints.climb(
            abstract,
            resume_from=cfg.resume_from,
            weights=trainer.initial_weights,
            scratch=lambda params: init_state(network, tx, abstract, jax.random.key(cfg.seed), params),
        )
        start = int(state["step"])
        trainer.check_cursor(loader, cursor)
        loader.seek(cursor["step"] if cursor else 0)
        log.logger.info("%s; %s parameters on %d devices", how, f"{network.count():,}", jax.device_count())

        frozen = assembly.frozen(layout) if needs_frozen else {}
        frozen |= trainer.perceptual_params() | trainer.null_text(frozen)

        # ---- step and loop ---------------------------------------------------------------------------------------
        step_fn = trainer.compile_step(tx, abstract)
        writer = MetricWriter(
            workdir, tensorboard=cfg.log.tensorboard, wandb_project=cfg.log.wandb_project, config=config.to_plain(cfg)
        ) if jax.process_index() == 0 else None  # fmt: skip
        report = hooks.Reporter(writer, cfg, start=start)
        stopper, profiler = hooks.Stopper(), hooks.Profiler(cfg.log.profile_steps, workdir / "profile")
        save_now, sample_now = hooks.Every(cfg.checkpoint.every_steps), hooks.Every(cfg.log.sample_every_steps)
        cleanup.callback(stopper.restore)
        try:
            for step in range(start + 1, cfg.steps + 1):
                with report.watch.span("data"):
                    batch, info = next(loader)
                profiler(step)
                state, metrics = step_fn(state, trainer.place(batch), frozen)
                report.step(step, metrics, **trainer.work(batch, info))
                stop = runtime.any_process(stopper.asked)
                if save_now(step) or step == cfg.steps or stop:
                    checkpoints.save(state, trainer.meta(), loader.position(step))
                if sample_now(step) and not stop:
                    trainer.sample(state["ema"], frozen, workdir / "samples", step, writer)
                if stop:
                    break
        finally:
            report.close()
            checkpoints.close()
        finished = int(state["step"])
        log.logger.info("step %d of %d is saved in %s", finished, cfg.steps, checkpoints.folder)
        if args.export and finished >= cfg.steps:
            trainer.export(
                state["ema"],
                frozen if needs_frozen else assembly.frozen(layout),
                loader,
                args.export,
                args.export_dtype,
            )
            log.logger.info("pipeline written to %s", args.export)
    return 0


def writable(workdir):
    """The run's folder, or one sentence now rather than a traceback after an hour."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from None
    return workdir


def run() -> None:
    sys.exit(guarded(main))


if __name__ == "__main__":
    run()
