"""libtpu as a compiler on a machine without TPUs: its environment, its lock, its litter.

`prepare` must come before jax is imported: libtpu reads the environment when it loads. It then takes no lock (several
plans may run at once), asks no metadata server, compiles with the flags of a run (parallel/overlap.py), and writes its
logs into a folder that goes away with the process.
"""

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from opensora_jax.common.errors import UserError
from opensora_jax.parallel import overlap

QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # of this machine, which has none: silences a warning and decides nothing
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from there is not written down again, and runs nowhere here
}


def dump_to(folder) -> str:
    """Of LIBTPU_INIT_ARGS: write every kernel's schedule there (bundles.py reads it), but not the passes that led to it,
    which take twenty times the space."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final"


def prepare(extra_arguments: str = "") -> None:
    """extra_arguments: for LIBTPU_INIT_ARGS, such as where to dump schedules."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for a TPU needs its compiler: pip install 'opensora-jax[aot]' (libtpu; no TPU needed)"
        )
    os.environ.update(QUIET)
    flags = (overlap.with_flags(os.environ, overlap.TPU), extra_arguments)
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(filter(None, flags))
    if "TPU_LOG_DIR" not in os.environ:
        os.environ["TPU_LOG_DIR"] = temporary("libtpu-logs-")


def compiled(lowered):
    """The executable and its program, as the compiler itself writes it down: jax 0.10.2 cannot read back one whose exchanges
    run on the sparse cores."""
    with tempfile.TemporaryDirectory(prefix="libtpu-program-") as folder:
        executable = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_long_text": True})
        (written,) = Path(folder).glob("*.after_codegen.txt")
        return executable, written.read_text()


def temporary(prefix: str) -> str:
    """A folder that goes away with the process."""
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def devices(topology) -> list:
    """Descriptions of the chips; nothing is connected to."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--topology={topology.name}: the TPU compiler knows no such topology ({reason})") from None
