"""The command lines: `python -m data_pipelines.run` and each stage alone, with the same flags.

python -m data_pipelines.STAGE --input=DIR|PARQUET|CSV --output=DIR [--OPTION=VALUE …] [--runner=local|ray]
"""

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Sequence

import pyarrow as pa

from data_pipelines import files, pipeline, tables
from data_pipelines.pipeline import Options, Step
from data_pipelines.stage import Stage, configure, find
from opensora_jax.common.errors import UserError, guarded

METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false", int | None: "N"}
METAVARS |= {tuple[str, ...]: "A,B,…", tuple[float, ...]: "X,Y,…"}


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m data_pipelines.{name}",
        usage="%(prog)s --input=… --output=… [--OPTION=VALUE …]",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument_group("of every step").add_argument
    add("--input", metavar="PATH", required=True, help="a folder of videos, or a .parquet or .csv with a column path")
    add("--output", metavar="DIR", required=True, help="folder for results; a run continues what it finds there")
    add("--runner", choices=("local", "ray"), default="local", help="threads on this machine, or a Ray cluster")
    add("--ray_address", metavar="NAME", help="a running cluster, say auto; without it Ray starts on this machine")
    add("--workers", metavar="N", type=int, help="most workers of a stage (default: one a core)")
    add("--batch_size", metavar="N", type=int, help="rows a worker finishes before they count as done")
    add("--max_error_share", metavar="X", type=float, default=0.1, help="stop when more rows fail (default 0.1)")
    add("--retry_errors", action="store_true", help="try rows again that failed in an earlier run")
    add("--quiet", action="store_true", help="say nothing of the progress")
    add("--debug", action="store_true", help="show the traceback of an error")
    return made


def options(args: argparse.Namespace) -> Options:
    return Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})


def rows(args: argparse.Namespace) -> pa.Table:
    source, output = tables.result(files.absolute(args.input)), files.absolute(args.output)
    if f"{output}/".startswith(f"{source.rstrip('/')}/"):
        raise UserError(
            f"--output {args.output} lies in --input {args.input}: the next run would take clips for videos"
        )
    return tables.read_input(args.input)


def remarks(config: type) -> dict[str, str]:
    """What the source says beside each option, which is what --help says of it."""
    lines = inspect.getsource(config).splitlines()
    found = (re.match(r"\s+(\w+): .*?  # (.+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def stage(cls: type[Stage], argv: Sequence[str] | None = None) -> int:
    """The entry of a stage's own module."""
    name = getattr(cls, "__module__", "").rsplit(".", 1)[-1]
    if name == "__main__":  # python -m data_pipelines.probe: workers must import the class by its real name
        import sys

        cls = find(getattr(sys.modules["__main__"].__spec__, "name", "").rsplit(".", 1)[-1])
        name = cls.__module__.rsplit(".", 1)[-1]
    import importlib

    flags = parser(name, importlib.import_module(cls.__module__).__doc__)
    hints, said = typing.get_type_hints(cls.Config), remarks(cls.Config)
    own = flags.add_argument_group(f"of {name}")
    for field in dataclasses.fields(cls.Config):
        default = field.default if isinstance(field.default, (str, tuple)) else str(field.default).lower()
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        words = [said[field.name]] if field.name in said else []
        words += ["(required)" if field.default is dataclasses.MISSING else f"(default {shown})" if shown else ""]
        own.add_argument(
            f"--{field.name}", metavar=METAVARS[hints[field.name]], help=" ".join(words).strip().replace("%", "%%")
        )

    def main() -> None:
        args = flags.parse_args(argv)
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls.Config)}
        config = configure(cls, {k: v for k, v in given.items() if v is not None})
        table = rows(args)
        steps = [Step(name, cls, config)]
        probe = find("probe")
        there = cls.prepare(table.slice(0, 0), config).column_names  # what the step adds for itself is not lacking
        lacking = [c for c in cls.inputs(config) if c not in there]
        if lacking and cls is not probe:
            if not set(lacking) <= set(probe.columns_out):
                raise UserError(f"{name} needs the column {lacking[0]}; --input has {', '.join(table.column_names)}")
            keep = find("filter")
            steps = [
                Step("probe", probe, configure(probe, {})),
                Step("usable", keep, configure(keep, {"keep": ("status == 'ok'",)})),
                *steps,
            ]
        pipeline.run(steps, table, options(args))

    return guarded(main)
