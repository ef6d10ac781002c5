"""From raw videos to a training set in one command.

    python -m data_pipelines.run --config=data_pipelines/configs/curate.py --input=VIDEOS --output=WORK
    python -m data_pipelines.run --config=… --input=… --output=… --runner=ray --ray_address=auto
    python -m data_pipelines.run --config=… --config.scene_cut.min_seconds=2 …

A config file has `get_config()` with `steps`, the labels in order, and for each label the options of its stage; a label
that is no stage's name says which stage it is with `stage`. The same --output continues where the last run stopped.
"""

import ast
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, cast

import ml_collections

from data_pipelines import entry, pipeline
from data_pipelines.pipeline import Step
from data_pipelines.stage import configure, find
from opensora_jax.common.errors import UserError, guarded


def load(path: str, overrides: list[str]) -> ml_collections.ConfigDict:
    shipped = Path(__file__).parents[1] / path  # data_pipelines/configs/… is found from any folder
    found = path if os.path.isfile(path) or not shipped.is_file() else str(shipped)
    if not os.path.isfile(found):
        raise UserError(f"--config {path} does not exist")
    spec = importlib.util.spec_from_file_location("pipeline_config", found)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    for item in overrides:
        name, equals, text = item.removeprefix("--config.").partition("=")
        if not item.startswith("--config.") or not equals:
            raise UserError(f"unknown flag {item}; options of steps are written --config.STEP.OPTION=VALUE")
        override(config, name, text)
    return config


def override(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    try:
        value: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    *folders, last = name.split(".")
    place: Any = config
    for folder in folders:
        if folder in place.get("steps", ()) and folder not in place:
            with place.unlocked():
                place[folder] = ml_collections.ConfigDict()
        if folder not in place:
            raise UserError(f"--config.{name}: there is no step {folder}; steps are {', '.join(config.steps)}")
        place = place[folder]
    with place.ignore_type(), place.unlocked():
        place[last] = value


def steps(config: ml_collections.ConfigDict) -> list[Step]:
    made, labels = [], cast(list[str], config.steps)
    for label in labels:
        chosen = dict(config.get(label, {}))
        stage = find(chosen.pop("stage", label))
        made.append(Step(label, stage, configure(stage, chosen)))
    if len({step.label for step in made}) < len(made):
        raise UserError("two steps of the config have the same label; name one of them otherwise and give it stage=")
    idle = set(config.keys()) - set(config.steps) - {"steps"}
    if idle:
        raise UserError(f"the config sets options of {sorted(idle)[0]}, which is not among its steps")
    return made


def main() -> None:
    flags = entry.parser("run", __doc__)
    flags.usage = "%(prog)s --config=FILE --input=… --output=… [--config.STEP.OPTION=VALUE …]"
    flags.add_argument("--config", metavar="FILE", required=True, help="the steps and their options")
    args, rest = flags.parse_known_args()
    plan = steps(load(args.config, rest))
    pipeline.run(plan, entry.rows(args), entry.options(args))


if __name__ == "__main__":
    sys.exit(guarded(main))
