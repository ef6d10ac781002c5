"""Finds near-duplicates and keeps the best of each group.

    python -m data_pipelines.dedup --input=WORK/table.parquet --output=DIR [--embedding=clip_embedding]

By perceptual hash (four frames, 256 bits): exact for small sets; above `exact_rows`, rows that share a 16-bit band are
compared, which cannot miss a pair that differs in fewer than 16 bits. By embedding (`embedding` names the column):
exact cosines in blocks up to `index_rows`, then an HNSW index (usearch). 1.3 asked for cosine ≥ 0.98. Groups are the
connected pairs; the row that is first by `keep_by` stays. `duplicate_of` names it for the others, which go unless
drop=false.
"""

import dataclasses
import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines import entry, tables
from data_pipelines.stage import TableStage
from opensora_jax.common.errors import UserError

BITS, BAND = 256, 16


class Dedup(TableStage):
    @dataclasses.dataclass(frozen=True)
    class Config:
        most_bits: int = 24  # of 256; 0 leaves hashes out
        embedding: str = ""  # a column of vectors to compare too, such as clip_embedding
        least_cosine: float = 0.98  # of two vectors that are the same
        keep_by: tuple[str, ...] = ("resolution", "num_frames")  # larger is better; ties go to the first id
        drop: bool = True  # false: only name the doubles, in duplicate_of
        exact_rows: int = 20_000  # up to so many, every hash is compared with every other
        index_rows: int = 1_000_000  # over so many, vectors are compared through an index, nearly all right

    @classmethod
    def check(cls, config):
        if not config.most_bits and not config.embedding:
            raise UserError("dedup has nothing to compare: give most_bits or the name of an embedding column")

    @classmethod
    def inputs(cls, config):
        return (*(["phash"] if config.most_bits else []), *filter(None, [config.embedding]), *config.keep_by)

    def table(self, table):
        config, count = self.config, table.num_rows
        first, second, near = [], [], []
        if config.most_bits:
            for pairs, bits in hash_pairs(table["phash"], config.most_bits, config.exact_rows):
                first.append(pairs[:, 0]), second.append(pairs[:, 1]), near.append(1 - bits / BITS)
        if config.embedding:
            for pairs, cosine in cosine_pairs(table[config.embedding], config.least_cosine, config.index_rows):
                first.append(pairs[:, 0]), second.append(pairs[:, 1]), near.append(cosine)
        first, second, near = (np.concatenate(x) if x else np.zeros(0) for x in (first, second, near))
        group = components(count, first.astype(np.int64), second.astype(np.int64))
        keeper = best(table, group, config.keep_by)
        similar = np.full(count, np.nan)
        for ends in (first, second):
            np.fmax.at(similar, ends.astype(np.int64), near)
        ids = table["id"]
        other = keeper != np.arange(count)
        table = tables.set_column(table, "duplicate_of", pc.if_else(pa.array(other), ids.take(pa.array(keeper)), None))
        table = tables.set_column(table, "duplicate_similarity", pa.array(similar, from_pandas=True))
        sizes = np.bincount(keeper, minlength=1)
        report = {"rows": count, "duplicates": int(other.sum()), "groups": int((sizes > 1).sum()), "pairs": len(first)}
        line = f"{report['duplicates']} of {count} rows repeat another ({report['groups']} groups)"
        kept = table.filter(pa.array(~other)) if config.drop else table
        return kept, {**report, "lines": [line], "largest_group": int(sizes.max(initial=0))}


def matrix(column: pa.ChunkedArray, kind) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers that have a value, their values [N, D])."""
    valid = np.flatnonzero(np.asarray(pc.is_valid(column)))
    values = column.drop_null().combine_chunks()
    flat = pc.list_flatten(values).to_numpy(zero_copy_only=False)
    return valid, flat.reshape(len(valid), -1).astype(kind) if len(valid) else np.zeros((0, 1), kind)


def hash_pairs(column: pa.ChunkedArray, most: int, exact_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows whose hashes differ in at most `most` bits, with the number of bits."""
    valid, words = matrix(column, np.uint64)
    if len(valid) <= exact_rows:
        for k in range(len(valid) - 1):
            bits = np.bitwise_count(words[k + 1 :] ^ words[k]).sum(axis=1)
            hit = np.flatnonzero(bits <= most)
            if len(hit):
                yield np.stack([np.full(len(hit), valid[k]), valid[k + 1 + hit]], axis=1), bits[hit]
        return
    bands = words.view(np.uint16).reshape(len(words), -1)
    for band in range(bands.shape[1]):
        order = np.argsort(bands[:, band], kind="stable")
        edges = np.flatnonzero(np.diff(bands[order, band], prepend=-1, append=-1))
        for distance in range(1, int(np.diff(edges).max(initial=0))):
            a, b = order[:-distance], order[distance:]
            same = bands[a, band] == bands[b, band]
            if not same.any():
                break
            a, b = a[same], b[same]
            bits = np.bitwise_count(words[a] ^ words[b]).sum(axis=1)
            hit = bits <= most
            if hit.any():
                yield np.stack([valid[a[hit]], valid[b[hit]]], axis=1), bits[hit]


def cosine_pairs(column: pa.ChunkedArray, least: float, index_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    valid, vectors = matrix(column, np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if len(valid) > index_rows:
        yield from indexed_pairs(valid, vectors, least)
        return
    block = 2048
    for start in range(0, len(valid), block):
        for other in range(start, len(valid), block):
            cosine = vectors[start : start + block] @ vectors[other : other + block].T
            a, b = np.nonzero(cosine >= least)
            ahead = a + start < b + other
            if ahead.any():
                a, b = a[ahead], b[ahead]
                yield np.stack([valid[a + start], valid[b + other]], axis=1), cosine[a, b]


def indexed_pairs(valid: np.ndarray, vectors: np.ndarray, least: float, neighbours: int = 16):
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="cos", dtype="f16")
    index.add(np.arange(len(vectors)), vectors)
    for start in range(0, len(vectors), 65536):
        block = vectors[start : start + 65536]
        found = index.search(block, neighbours)
        keys = np.asarray(found.keys).reshape(len(block), -1)
        distance = np.asarray(found.distances).reshape(keys.shape)
        a, place = np.nonzero(1 - distance >= least)
        b = keys[a, place].astype(np.int64)
        ahead = a + start < b
        yield np.stack([valid[a[ahead] + start], valid[b[ahead]]], axis=1), 1 - distance[a[ahead], place[ahead]]


def components(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The smallest row number of each row's group (union-find with path halving)."""
    parent = np.arange(count)

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    for a, b in zip(first.tolist(), second.tolist()):
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    for k in np.unique(np.concatenate([first, second])).tolist():
        parent[k] = root(k)
    return parent


def best(table: pa.Table, group: np.ndarray, keep_by: tuple[str, ...]) -> np.ndarray:
    """For every row the number of the row that stands for its group."""
    keys = [("group", "ascending"), *((name, "descending") for name in keep_by), ("id", "ascending")]
    ranked = pa.table({"group": pa.array(group), **{n: table[n] for n in keep_by}, "id": table["id"]})
    order = np.asarray(pc.sort_indices(ranked, keys))
    _, starts = np.unique(group[order], return_index=True)
    keeper = np.arange(len(group))
    keeper[group[order[starts]]] = order[starts]
    return keeper[group]


STAGE = Dedup

if __name__ == "__main__":
    sys.exit(entry.stage(Dedup))
