"""The house rules that a machine can check: directions of imports, names, what importing the package costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "opensora_jax"

# Room -> rooms it may import from inside the package.
MAY_IMPORT = {
    "common": set(),
    "parallel": {"common"},
    "kernels": {"parallel", "common"},
    "nn": {"kernels", "parallel", "common"},
    "models": {"nn", "kernels", "parallel", "common"},
    "vaes": {"nn", "kernels", "parallel", "common"},
    "text": {"nn", "kernels", "parallel", "common"},
    "diffusion": {"common"},
    "sampling": {"common", "diffusion"},
    "metrics": {"common"},
    "data": {"common"},
    "weights": {"common"},
    "training": {"diffusion", "data", "parallel", "common", "sampling"},
}
THIRD_PARTY = {
    "common": {"jax", "flax", "grain", "torch"},
    "data": {"flax", "torch", "optax", "orbax"},
    "kernels": {"flax"},
    "diffusion": {"flax"},
}
ENTRIES = {
    "data/inspect.py"
}  # commands that live in the room they serve: like every entry point, they may use anything
BACK_ENDS = {"pallas_tpu", "pallas_gpu", "mosaic_gpu", "cudnn"}  # of attention; "xla" is also the compiler's name
FORBIDDEN_NNX = {"jit", "scan", "remat", "grad", "value_and_grad", "Optimizer"}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts and "_configs" not in p.parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            if node.module == "opensora_jax":
                yield from ((f"opensora_jax.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    room = path.relative_to(PACKAGE).parts[0]
    if room not in MAY_IMPORT or path.relative_to(PACKAGE).as_posix() in ENTRIES:
        return
    wrong = []
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "opensora_jax" and len(parts) > 1:
            other = parts[1]
            if other != room and other not in MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
            if room in ("models", "vaes", "text") and other in ("models", "vaes", "text") and other != room:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
        elif parts[0] in THIRD_PARTY.get(room, ()):
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_called_utils():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert [name for name in tracked if "util" in Path(name).name.lower()] == []


def test_no_object_transforms_of_nnx():
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            of_nnx = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx"
            if of_nnx and node.attr in FORBIDDEN_NNX:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} nnx.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_attention_back_ends_are_named_in_kernels_only():
    names = "|".join(path.stem for path in (PACKAGE / "kernels").glob("*.py") if path.stem in BACK_ENDS)
    assert names.count("|") == len(BACK_ENDS) - 1
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in modules()
        if path.relative_to(PACKAGE).parts[0] != "kernels"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(rf"\b({names}|mosaic|splash)\b", line, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


def test_only_the_tokenizers_import_transformers():
    wrong = [
        str(path.relative_to(ROOT))
        for path in modules()
        if any(name.split(".")[0] == "transformers" for name, _ in imports(path))
        and path.relative_to(PACKAGE) != Path("text/tokenizers.py")
    ]
    assert not wrong


def test_importing_the_package_imports_no_jax():
    code = "import sys, opensora_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_configuration_key_is_read():
    """A key that nobody reads is a promise that nobody keeps."""
    import dataclasses
    import typing

    from opensora_jax.training.run import RunConfig

    def keys(cls):
        for field, kind in typing.get_type_hints(cls).items():
            yield field
            if dataclasses.is_dataclass(kind):
                yield from keys(kind)

    nodes = [node for path in modules() for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    by_name = {node.value for node in nodes if isinstance(node, ast.Constant)}  # getattr(config, "fsdp")
    assert sorted(set(keys(RunConfig)) - read - by_name) == []


def test_every_preset_has_weight_rules_and_a_row_in_the_docs():
    from opensora_jax import convert

    table = convert.tables()
    page = (ROOT / "docs" / "models.md").read_text()
    for stem, (room, _) in table.items():
        module = __import__(f"opensora_jax.{room}.{stem}", fromlist=["PRESETS"])
        missing = [preset for preset in module.PRESETS if f"`{preset}`" not in page]
        assert not missing, f"docs/models.md lacks {missing}: tools/models writes it"
