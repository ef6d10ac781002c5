"""Recorded activations of the reference systems, replayed through our public code.

    python -m opensora_jax.verify PATH... [--json] [--family F]

A case is a folder with case.json and safetensors (schema: docs/convert.md). An adapter is a module in
verify/adapters/ that names the families it serves and, for one run of a case, returns our outputs in the layout of
the recording:

    def replay(case: Case, run: str) -> dict[str, Array]      # names without "run/"; intermediates as "inter.x"
    def tables(case: Case) -> Iterator[tuple[str, ours, recorded]]   # cases whose expectations are in case.data
    FAMILIES = {"stdit3_v12": Adapter("stdit3", replay)}

Everything that `case.load` touches goes through the same rules as `convert`.
"""
