"""python -m opensora_jax.convert --from=PATH --to=DIR [--family=F] [--dtype=bfloat16] [--ema]

Reference checkpoints into ours and back. The family is told from names and shapes; every tensor must match exactly one
rule, or all that does not is listed and nothing is written. Tensors are streamed one at a time.

    --from=x.safetensors | FOLDER | x.pth | org/name[/file]   --to=DIR    our layout, one network
    --to-torch --from=DIR --to=DIR2                                       back to the reference's names
    --list                                                                families, presets, official repositories
    --manifest=FILE                                                       check names and shapes, no weights needed
"""

import importlib
import json
import shutil
import sys
from functools import partial
from pathlib import Path

from opensora_jax import config
from opensora_jax.common.errors import UserError, guarded

ROOMS = ("models", "vaes", "text")
KEPT = "reference_only"  # derived tensors of the reference, kept for the way back


def arguments(argv=None):
    parser = config.Parser("convert", __doc__)
    add = parser.add_argument
    add("--from", dest="source", metavar="PATH", help="a checkpoint file or folder, or a Hub id, org/name[/file]")
    add("--to", metavar="DIR", help="where the converted network goes")
    add("--family", help="name it when recognition cannot (see --list)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="store floats as (as they are)")
    add("--ema", action="store_true", help="take the EMA weights of a training checkpoint")
    add("--to-torch", dest="to_torch", action="store_true", help="from our folder back to the reference's names")
    add("--list", action="store_true", help="families, presets and official repositories")
    add("--manifest", nargs="+", metavar="FILE", help="names-and-shapes files to check against our full-size networks")
    return parser.parse(argv)


def main(argv=None) -> int:
    args, rest = arguments(argv)
    if rest:
        raise UserError(f"{rest[0]}: convert takes no configuration")
    if args.list:
        print(listing())
        return 0
    if args.manifest:
        return check_manifests(args.manifest)
    if not args.source or not args.to:
        raise UserError("--from=PATH and --to=DIR are both needed; see python -m opensora_jax.convert --help")
    return (to_reference if args.to_torch else from_reference)(args)


# ---- families -----------------------------------------------------------------------------------------------------


def tables() -> dict[str, tuple[str, object]]:
    """Family → (room, its weight table), for every family that has both files."""
    found = {}
    for room in ROOMS:
        for stem in config.families(room):
            if (config.PACKAGE / "weights" / f"{stem}.py").exists():
                found[stem] = (room, importlib.import_module(f"opensora_jax.weights.{stem}"))
    return found


def recognise(shapes: dict, settings: dict, family: str | None, where) -> tuple[str, str]:
    """(room, family) of a checkpoint."""
    known = tables()
    if family:
        if family not in known:
            raise UserError(
                f"--family={family} is unknown{config.nearest(family, known)}; there are {', '.join(known)}"
            )
        return known[family][0], family
    fitting = [stem for stem, (_, table) in known.items() if table.recognise(shapes, settings)]
    if len(fitting) == 1:
        return known[fitting[0]][0], fitting[0]
    names = ", ".join(list(shapes)[:4])
    if not fitting:
        raise UserError(f"{where}: no family has such tensors ({names}, ...); name one with --family, see --list")
    raise UserError(f"{where} could be {' or '.join(fitting)}; name one with --family")


def network_of(room: str, family: str, shapes: dict, settings: dict, where):
    from opensora_jax.nn.params import Network

    module = importlib.import_module(f"opensora_jax.{room}.{family}")
    table = importlib.import_module(f"opensora_jax.weights.{family}")
    try:
        cfg = module.Config(**table.config_from(shapes, settings))
        network = Network.of(lambda rngs: module.build(cfg, rngs=rngs))
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{where} looks like {family}, but it or its config.json lacks what tells its size: {error}"
        ) from None
    return module, table, cfg, network


def listing() -> str:
    lines = [f"{'family':16s}{'preset':34s}official repository"]
    for stem, (room, _) in tables().items():
        module = importlib.import_module(f"opensora_jax.{room}.{stem}")
        repositories = getattr(module, "REPOSITORIES", {})
        for i, preset in enumerate(module.PRESETS):
            lines.append(f"{stem if i == 0 else '':16s}{preset:34s}{repositories.get(preset, '')}")
    return "\n".join(lines)


# ---- reference → ours ---------------------------------------------------------------------------------------------


def from_reference(args) -> int:
    import numpy as np

    from opensora_jax.weights import layouts, store
    from opensora_jax.weights.engine import flatten, plan
    from opensora_jax.weights.files import open_checkpoint

    checkpoint = open_checkpoint(resolve(args.source), ema=args.ema)
    room, family = recognise(checkpoint.shapes, checkpoint.config, args.family, checkpoint.path)
    checkpoint = checkpoint.joined(layouts.of(tables()[family][1], checkpoint.shapes, checkpoint.config))
    _, table, cfg, network = network_of(room, family, checkpoint.shapes, checkpoint.config, checkpoint.path)
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(network.abstract).items()}
    mapping = plan(checkpoint.shapes, wanted, table.RULES, str(checkpoint.path))
    check_tied(checkpoint, mapping)

    check_floats(checkpoint, mapping, flatten(network.abstract))
    found = {a.path: widest(checkpoint.dtypes[source] for source in a.sources.values()) for a in mapping.assignments}
    stored = lambda path: args.dtype if args.dtype and found[path] in FLOATS else found[path]
    specs = {a.path: (a.shape, stored(a.path)) for a in mapping.assignments}
    target = fresh_folder(args.to)
    with progress("converting", len(specs)) as bar:

        def arrays():
            for path, pieces in mapping.pieces(checkpoint.read, {p: store.numpy_dtype(d) for p, d in found.items()}):
                bar.update(note=path)
                yield path, map(partial(stored_as, path, specs[path][1]), pieces)

        def stored_as(path, dtype, array):
            check_finite(path, array, checkpoint.path)
            with np.errstate(over="ignore"):
                cast = array.astype(store.numpy_dtype(dtype), copy=False)
            if args.dtype == "float16":  # whose largest number is 65504
                check_finite(path, cast, f"--dtype=float16 of {checkpoint.path}")
            return cast

        try:
            store.write_folder(target.partial, specs, arrays(), {"family": family} | config.to_plain(cfg))
            keep_for_the_way_back(target.partial, checkpoint, mapping)
        except BaseException:
            shutil.rmtree(target.partial, ignore_errors=True)
            raise
    target.finish()
    counted = network.count()
    print(f"{family}: {len(checkpoint.shapes)} tensors, {counted:,} parameters → {args.to}")
    if mapping.dropped:
        print(
            f"derived, kept aside for the way back: {', '.join(mapping.dropped[:6])}{' ...' if len(mapping.dropped) > 6 else ''}"
        )
    return 0


def keep_for_the_way_back(folder: Path, checkpoint, mapping) -> None:
    """What we derive or share is written beside our weights, so that the way back is exact to the bit."""
    from opensora_jax.weights import store

    if mapping.dropped:
        specs = {name: (checkpoint.shapes[name], checkpoint.dtypes[name]) for name in mapping.dropped}
        store.write_safetensors(folder / f"{KEPT}.bin", specs, ((name, checkpoint.read(name)) for name in specs))
    recipes = {name: recipe.plain() for name, recipe in checkpoint.recipes.items()}
    facts = {"prefix": checkpoint.prefix, "tied": mapping.tied, "config": checkpoint.config, "recipes": recipes}
    (folder / f"{KEPT}.json").write_text(json.dumps(facts, indent=1) + "\n")


def check_tied(checkpoint, mapping) -> None:
    import numpy as np

    first = {a.path: next(iter(a.sources.values())) for a in mapping.assignments if not a.rule.stacked}
    for name, path in mapping.tied:
        if path in first and not np.array_equal(checkpoint.read(name), checkpoint.read(first[path])):
            raise UserError(f"{checkpoint.path}: {name} and {first[path]} should be the same tensor, but differ")


FLOATS = ("float32", "bfloat16", "float16", "float64")


def widest(dtypes) -> str:
    """Layers of several precisions are stacked in one that holds them all."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    return "float64" if kinds & {"float64", "int64"} else "float32"


def check_floats(checkpoint, mapping, parameters: dict) -> None:
    for assignment in mapping.assignments:
        takes = str(parameters[assignment.path].dtype)
        for source in assignment.sources.values():
            if takes in FLOATS and checkpoint.dtypes[source] not in FLOATS:
                raise UserError(
                    f"{checkpoint.path}: {source} holds {checkpoint.dtypes[source]}, but {assignment.path} takes {takes}; "
                    "quantised checkpoints are not read"
                )


def check_finite(path: str, array, where) -> None:
    import numpy as np

    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return
    flat = array.reshape(-1)
    for start in range(0, flat.size, 1 << 24):  # in pieces: a tensor may be a gigabyte
        if not np.isfinite(flat[start : start + (1 << 24)].astype(np.float32)).all():
            raise UserError(
                f"{where}: the weights of {path} are not all finite; the file is damaged or the training diverged"
            )


class fresh_folder:
    """A folder that gets its name when it is whole."""

    def __init__(self, name: str):
        self.folder = Path(name)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--to={name} is a file; choose a new folder")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"--to={name} is not empty; choose a new folder")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--to={name} cannot be written: {error.strerror}") from None

    def finish(self) -> None:
        if self.folder.exists():
            self.folder.rmdir()
        self.partial.rename(self.folder)


def progress(title: str, total: int):
    from opensora_jax.common.progress import Progress

    return Progress(title, total)


def resolve(source: str) -> Path:
    """A path, or the local copy of a Hub repository, or of one file or folder in it."""
    from opensora_jax.locate import download

    path = Path(source)
    local = path.exists() or source.startswith((".", "/", "~")) or Path(path.parts[0]).exists()
    return path if local or "/" not in source else download(source)


# ---- ours → reference ---------------------------------------------------------------------------------------------


def to_reference(args) -> int:
    from opensora_jax.weights import store
    from opensora_jax.weights.engine import reference_arrays
    from opensora_jax.weights.layouts import separated

    folder = Path(args.source)
    reader = store.Folder(folder)
    family = args.family or reader.config.get("family")
    known = tables()
    if family not in known:
        raise UserError(f"{folder}/config.json names no family of ours ({family!r}); there are {', '.join(known)}")
    table = known[family][1]
    kept = read_kept(folder)
    store_dtype = lambda array: args.dtype if args.dtype and array.dtype.kind in "fV" else array.dtype.name

    shapes: dict = {}
    hollow = lambda path: store.hollow(reader.shapes[path], reader.dtype(path))
    for name, array in separated(reference_arrays(reader.shapes, hollow, table.RULES), kept["recipes"]):
        shapes[name] = (array.shape, store_dtype(array))
    shapes |= {name: (kept["checkpoint"].shapes[name], kept["checkpoint"].dtypes[name]) for name in kept["names"]}
    again = {name: tied_of(name, table.RULES).back for name, _ in kept["tied"]}
    shared = {name: again[name](hollow(path)) for name, path in kept["tied"]}
    shapes |= {name: (array.shape, store_dtype(array)) for name, array in shared.items()}

    def arrays():
        for name, array in separated(reference_arrays(reader.shapes, reader.read, table.RULES), kept["recipes"]):
            yield name, array.astype(store.numpy_dtype(shapes[name][1]), copy=False)
        yield from ((name, kept["checkpoint"].read(name)) for name in kept["names"])
        for name, path in kept["tied"]:
            yield name, again[name](reader.read(path)).astype(store.numpy_dtype(shapes[name][1]), copy=False)

    target = fresh_folder(args.to)
    prefixed = {kept["prefix"] + name: spec for name, spec in shapes.items()}
    try:
        named = ((kept["prefix"] + name, array) for name, array in arrays())
        store.write_folder(target.partial, prefixed, named, kept["config"] or None)
    except BaseException:
        shutil.rmtree(target.partial, ignore_errors=True)
        raise
    target.finish()
    print(f"{family}: {len(shapes)} tensors under the reference's names → {args.to}")
    return 0


def tied_of(name: str, rules):
    """The transform of a tensor that is another's under a second name."""
    return next(rule.transform for rule in rules if rule.tied and rule.source_pattern.fullmatch(name))


def read_kept(folder: Path) -> dict:
    from opensora_jax.weights.files import _open_safetensors
    from opensora_jax.weights.layouts import Recipe

    facts = folder / f"{KEPT}.json"
    known: dict = {"prefix": "", "tied": [], "config": {}, "recipes": {}}
    known |= json.loads(facts.read_text()) if facts.exists() else {}
    tensors = folder / f"{KEPT}.bin"
    checkpoint = _open_safetensors(tensors, {}) if tensors.exists() else None
    known["recipes"] = {name: Recipe.of(plain) for name, plain in known["recipes"].items()}
    return known | {"checkpoint": checkpoint, "names": list(checkpoint.shapes) if checkpoint else []}


# ---- manifests ----------------------------------------------------------------------------------------------------


def check_manifests(files: list[str]) -> int:
    """Names and shapes of full-size checkpoints against our abstract networks; no weights, no memory."""
    from opensora_jax.weights import layouts
    from opensora_jax.weights.engine import MappingError, flatten, plan

    failures = 0
    for file in files:
        try:
            manifest = json.loads(Path(file).read_text())
            tensors = manifest["parameters"] | manifest.get("buffers", {})
            shapes = {name: tuple(map(int, shape)) for name, shape in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file} is no manifest; it needs `parameters`: {{name: shape}}") from None
        settings = manifest.get("config") or {}
        label = manifest.get("model", Path(file).stem)
        room, family = recognise(shapes, settings | {"family": label}, None, file)
        shapes = layouts.joined(shapes, layouts.of(tables()[family][1], shapes, settings)).shapes
        _, table, _, network = network_of(room, family, shapes, settings, file)
        wanted = {path: tuple(leaf.shape) for path, leaf in flatten(network.abstract).items()}
        try:
            plan(shapes, wanted, table.RULES, file)
            total, ours = manifest.get("total_params"), network.count()
            ok = total in (None, ours)
            print(
                f"{'ok  ' if ok else 'FAIL'} {label:40s} {family:16s} {len(shapes):5d} tensors  {ours:>14,} parameters",
                flush=True,
            )
            if not ok:
                print(f"     the manifest counts {total:,}")
        except MappingError as error:
            ok = False
            print(f"FAIL {label}: {error}")
        failures += not ok
    return int(failures > 0)


def run() -> None:
    sys.exit(guarded(main))


if __name__ == "__main__":
    run()
