"""Received HDF5 files: nothing of another file is read through them, and memory stays in proportion to their size."""

from __future__ import annotations

import itertools
import math
import os
import stat
import zlib
from collections.abc import Collection, Iterable
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse

from peka_lite._core._file_kinds import describe_mismatch

LINKS, DEEPEST = 100_000, 64  # most links in a file, and nested groups
PARTS = 10_000  # most groups and datasets of what is read
FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
FLOOR, RATIO, LARGEST = 2**30, 256, 2**36  # bytes of memory: for any file, for each byte of it, and at most
CHUNK = 2**28  # bytes of a part, where a dataset is stored or read in parts
TEXT = 120  # bytes of memory that Python takes for a text beside its letters
PIXELS = 50_000_000  # of one picture; Visium HD's largest has 36 million
PICTURES = ("hires", "lowres", "downscaled_fullres")
FACTORS = ("spot_diameter_fullres", *(f"tissue_{name}_scalef" for name in PICTURES))
_ELEMENTS = {
    "", "array", "string-array", "string", "numeric-scalar", "dict", "dataframe", "categorical", "null",
    "nullable-integer", "nullable-boolean", "nullable-string-array", "rec-array",
}  # fmt: skip
_INSIDE = "Ask for a file that holds all of its data itself"
_AGAIN = "Download the file again"


class Hdf5Error(ValueError):
    """A received HDF5 file that is not read; the message names the file, the place in it and the fix."""

    def __init__(self, path, what: str, fix: str):
        super().__init__(f"{path}: {what}. {fix}")
        self.path, self.what, self.fix = path, what, fix


def open_hdf5(path: str | os.PathLike) -> h5py.File:
    """Open a received HDF5 file for reading, after a look at all of its links and datasets; no data is read.

    Raises
    ------
    FileNotFoundError
        For a file that is not there.
    Hdf5Error
        For a pipe, device or folder, what is no HDF5, soft, external and user-defined links, datasets whose values lie
        in other files (external storage, virtual datasets), more than 100,000 links, and groups nested more than 64
        deep.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise Hdf5Error(path, "is no file but a pipe, a device or a folder", "Give the HDF5 file itself")
    try:
        file = h5py.File(path, "r")
    except (OSError, RuntimeError, ValueError) as error:
        seen = describe_mismatch(path, {"hdf5"}) or error
        raise Hdf5Error(path, f"cannot be read as HDF5 ({seen})", _AGAIN) from None
    try:
        with _named(path, "HDF5"):
            _check_links(file, path)
    except BaseException:
        file.close()
        raise
    return file


def _check_links(file: h5py.File, path: Path) -> None:
    root = h5py.h5g.open(file.id, b"/")
    seen, left, n_links = {h5py.h5o.get_info(root).addr}, [(root, "", 0)], 0
    while left:
        group, above, depth = left.pop()
        names: list[bytes] = []
        group.links.iterate(lambda name: names.append(name) or (n_links + len(names) > LINKS or None))  # noqa: B023
        n_links += len(names)
        if n_links > LINKS:
            raise Hdf5Error(path, f"holds more than {LINKS:,} links", "Give a file with the slide alone")
        if depth >= DEEPEST:
            raise Hdf5Error(path, f"groups are nested more than {DEEPEST} deep", "Give a file with the slide alone")
        for name in names:
            kind = group.links.get_info(name).type
            place = f"{above}/{name.decode('utf-8', 'backslashreplace')}"
            if kind != h5py.h5l.TYPE_HARD or b"/" in name:
                kinds = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link to another file"}
                raise Hdf5Error(path, f"{place!r} is {kinds.get(kind, 'a link of an unknown kind')}", _INSIDE)
            found = h5py.h5o.open(group, name)
            at = h5py.h5o.get_info(found).addr
            if at in seen:
                continue
            seen.add(at)
            if isinstance(found, h5py.h5g.GroupID):
                left.append((found, place, depth + 1))
            elif isinstance(found, h5py.h5d.DatasetID):
                made = found.get_create_plist()
                if made.get_layout() == h5py.h5d.VIRTUAL:
                    raise Hdf5Error(path, f"{place!r} is a virtual dataset: its values lie in other files", _INSIDE)
                if made.get_external_count():
                    raise Hdf5Error(path, f"the values of {place!r} lie in another file (external storage)", _INSIDE)


def check_sizes(path: Path, nodes: Iterable[h5py.Group | h5py.Dataset], pictures: Iterable[h5py.Dataset] = ()) -> None:
    """Refuse parts of a file that take more memory than its size lets expect, before they are read.

    What is declared counts, at least 8 bytes a number: up to 1 GiB for any file, 256 bytes for each byte of a larger
    one (gzip gains at most a factor of 1,032, counts in a dense matrix up to about 200), and 64 GiB in all.
    """
    n_bytes, left, n_seen = 0, [(node, 0) for node in nodes], 0
    size = path.stat().st_size
    most = min(FLOOR + RATIO * size, LARGEST)
    texts = []

    def count(dataset: h5py.Dataset, each: int) -> None:
        nonlocal n_bytes
        n_bytes += max(each * math.prod(dataset.shape or ()), _chunk_bytes(dataset))
        if n_bytes > most:
            shape = " x ".join(f"{n:,}" for n in dataset.shape)
            raise Hdf5Error(
                path,
                f"{dataset.name!r} is declared as {shape} of {dataset.dtype}: with it {n_bytes:,} bytes would be read "
                f"from a file of {size:,}, and at most {most:,} are",
                "Is it damaged? Give a file with the slide alone",
            )

    for picture in pictures:
        count(picture, picture.dtype.itemsize)
        check_packing(picture, path)
    while left:
        # Each object as often as it is linked: a reader would read it as often.
        node, depth = left.pop()
        if (n_seen := n_seen + 1) > PARTS or depth > DEEPEST:
            raise Hdf5Error(path, f"{node.name!r} has too many parts, or links to itself", _AGAIN)
        if isinstance(node, h5py.Group):
            if (kind := _text(node.attrs.get("encoding-type", ""))) not in _ELEMENTS:
                raise Hdf5Error(path, f"{node.name!r} is of type {kind!r}, which is not read here", "Leave it out")
            left += [(node[name], depth + 1) for name in node]
        elif isinstance(node, h5py.Dataset):
            text = h5py.check_string_dtype(node.dtype)
            if text is None and node.dtype.kind not in "biufS":
                raise Hdf5Error(path, f"{node.name!r} holds neither numbers nor text", "Leave it out")
            count(node, max(8, node.dtype.itemsize) + (TEXT if text else 0))
            check_packing(node, path)
            if text is not None and text.length is None:
                texts.append(node)
    for dataset in texts:
        _check_texts(dataset, path, size)


def check_packing(dataset: h5py.Dataset, path: Path) -> None:
    """Refuse values that HDF5 would load a library for, or that are stored in fewer bytes than it takes them for."""
    check_storage(dataset, path)
    if dataset.chunks is not None:
        chunks: list[h5py.h5d.StoreInfo] = []
        dataset.id.chunk_iter(chunks.append)
        for chunk in chunks:
            check_chunk(dataset, path, chunk)


def check_storage(dataset: h5py.Dataset, path: Path) -> None:
    """Refuse filters that are not read, chunks of more than 256 MiB, and values that are cut short."""
    filters = _filters(dataset)
    if not FILTERS.keys() >= set(filters) or len(set(filters)) < len(filters) or {1, 32000} <= set(filters):
        names = ", ".join(FILTERS.get(number, f"no. {number}") for number in filters)
        raise Hdf5Error(path, f"{dataset.name!r} is packed by other filters than are read ({names})", "Pack it by gzip")
    if _chunk_bytes(dataset) > CHUNK:  # each is unpacked whole, for one value too
        what = f"the chunks of {dataset.name!r}, {dataset.chunks}, hold more than {CHUNK:,} bytes"
        raise Hdf5Error(path, what, "Write it in smaller ones: h5repack -l does")
    stored = dataset.id.get_storage_size()
    if dataset.chunks is None and 0 < stored < math.prod(dataset.shape or ()) * _item_bytes(dataset):
        raise Hdf5Error(path, f"{dataset.name!r} is declared larger than it is stored", _AGAIN)


def check_chunk(dataset: h5py.Dataset, path: Path, chunk: h5py.h5d.StoreInfo) -> None:
    """Refuse a chunk that unpacks to another size than it is declared to hold.

    HDF5 does not look: it takes what lies behind a short one in memory for values, or ends the process.
    """
    whole, filters = _chunk_bytes(dataset), _filters(dataset)
    used = [number for place, number in enumerate(filters) if not chunk.filter_mask & 1 << place]
    size = chunk.size
    if 1 in used or 32000 in used:
        packed, packs = memoryview(dataset.id.read_direct_chunk(chunk.chunk_offset)[1]), 1 if 1 in used else 32000
        if 3 in used[used.index(packs) :]:
            packed = packed[:-4]
        size = _inflated(packed, whole) if packs == 1 else _lzf_size(packed)
        used = used[: used.index(packs)]
    if size - 4 * (3 in used) != whole:
        raise Hdf5Error(path, f"a part of {dataset.name!r} unpacks to another size than it is declared to hold", _AGAIN)


def _filters(dataset: h5py.Dataset) -> list[int]:
    made = dataset.id.get_create_plist()
    return [made.get_filter(i)[0] for i in range(made.get_nfilters())]


def _inflated(packed: memoryview, whole: int) -> int:
    """Return how many bytes gzip unpacks to, or more than `whole` where they are more; -1 for what is cut."""
    unpack, size = zlib.decompressobj(), 0
    while not unpack.eof and size <= whole + 4:
        part = unpack.decompress(packed, 2**20)
        packed, size = unpack.unconsumed_tail, size + len(part)
        if not part and not packed:
            break
    return size if unpack.eof else -1 if size <= whole else size


def _lzf_size(packed: memoryview) -> int:
    """Return how many bytes LZF unpacks to: runs of letters, and copies of 3 or more earlier ones."""
    size = at = 0
    while at < len(packed):
        first = packed[at]
        if first < 32:
            at, size = at + 2 + first, size + 1 + first
        elif first < 224:
            at, size = at + 2, size + 2 + (first >> 5)
        else:
            size += 9 + (packed[at + 1] if at + 1 < len(packed) else 0)
            at += 3
    return size if at == len(packed) else -1


class Rows:
    """Rows of a dataset; what is stored of one is checked (`check_chunk`) before it is first read."""

    def __init__(self, dataset: h5py.Dataset, path: Path):
        self._dataset, self._path, self._checked = dataset, path, set()

    def __getitem__(self, row: int) -> np.ndarray:
        with _named(self._path, "HDF5"):
            if (chunks := self._dataset.chunks) is not None and (number := row // chunks[0]) not in self._checked:
                rest = (range(0, n, each) for n, each in zip(self._dataset.shape[1:], chunks[1:], strict=True))
                for offset in itertools.product([number * chunks[0]], *rest):
                    chunk = self._dataset.id.get_chunk_info_by_coord(offset)
                    if chunk.byte_offset is not None:  # else there is none, and the row is what fills it
                        check_chunk(self._dataset, self._path, chunk)
                self._checked.add(number)
            return self._dataset[row]


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    return math.prod(dataset.chunks) * _item_bytes(dataset) if dataset.chunks else 0


def _item_bytes(dataset: h5py.Dataset) -> int:
    """Return how many bytes a value takes in the file; of a text of any length that is its length and its place."""
    text = h5py.check_string_dtype(dataset.dtype)
    if text is not None and text.length is None:
        return 8 + dataset.file.id.get_create_plist().get_sizes()[0]
    return dataset.id.get_type().get_size()


def _check_texts(dataset: h5py.Dataset, path: Path, size: int) -> None:
    """Refuse texts that are longer together than the file: each is stored once, but may be named many times."""
    if not dataset.shape:  # one text
        return
    step, total = max(256, 2**29 // max(size, 1) // max(1, math.prod(dataset.shape[1:]))), 0
    for start in range(0, dataset.shape[0], step):
        total += sum(map(len, np.ravel(dataset[start : start + step])))
        if total > size:
            raise Hdf5Error(path, f"the texts of {dataset.name!r} are longer than the file", _AGAIN)


def read_table(node, path: Path) -> pd.DataFrame:
    """Read the table of an ``.h5ad`` file, after `check_sizes`."""
    if not isinstance(node, h5py.Group) or "_index" not in node.attrs:
        old = isinstance(node, h5py.Dataset)
        fix = "Read it with anndata 0.10 and write it again" if old else "Give a file that anndata wrote"
        raise Hdf5Error(path, "obs or var is no table" + (" of anndata 0.7 or newer" if old else ""), fix)
    inside, columns = set(node), [_text(name) for name in node.attrs["column-order"]]
    length = None
    for name in (_text(node.attrs["_index"]), *columns):
        if name not in inside or columns.count(name) > 1:  # a name with a slash leads elsewhere
            raise Hdf5Error(path, f"{node.name!r} does not hold the column {name!r}, which it names, once", _AGAIN)
        column = node[name]
        if isinstance(column, h5py.Group):
            column = column.get("codes", column.get("values"))
        length = getattr(column, "shape", None) if length is None else length
        if getattr(column, "shape", None) != length or length is None or len(length) != 1:
            raise Hdf5Error(path, f"column {name!r} of {node.name!r} has no value for each row", _AGAIN)
        # anndata before 0.7.? kept the categories elsewhere, and a reference to them.
        if "categories" in node[name].attrs and _text(node.attrs.get("encoding-version")) == "0.1.0":
            to = node[name].attrs["categories"]
            if not isinstance(to, h5py.Reference) or node[to].parent.name != f"{node.name}/__categories":
                raise Hdf5Error(path, f"the categories of '{node.name}/{name}' lie elsewhere", _AGAIN)
    table = read_elem(node)
    if not isinstance(table, pd.DataFrame):
        raise Hdf5Error(path, f"{node.name!r} is no table", _AGAIN)
    return table


def read_matrix(node, path: Path, shape: tuple[int, int], *, as_csr: bool) -> np.ndarray | sparse.spmatrix:
    """Read a matrix of numbers, after `check_sizes`: with `as_csr` a dense one too, in parts.

    `shape` is what the tables beside it say.
    """
    if isinstance(node, h5py.Dataset):
        if node.dtype.kind not in "biuf" or node.shape != shape:
            what = f"{node.name!r} is {node.dtype} {node.shape}, not numbers {shape}"
            raise Hdf5Error(path, what, "It must have a row for each of obs and a column for each of var")
        if not as_csr:
            return node[()]
        rows = max(1, CHUNK // max(1, shape[1] * node.dtype.itemsize))
        parts = [sparse.csr_matrix(node[start : start + rows]) for start in range(0, max(1, shape[0]), rows)]
        return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")
    kind = _text(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))[:3]
    if kind not in ("csr", "csc"):
        raise Hdf5Error(path, f"{node.name!r} is neither a matrix nor sparse (csr, csc)", "Write it with anndata")
    said = tuple(int(n) for n in np.ravel(node.attrs["shape" if "shape" in node.attrs else "h5sparse_shape"]))
    if said != shape:
        raise Hdf5Error(path, f"{node.name!r} has the shape {said}, obs and var give {shape}", _AGAIN)
    parts = [node[name][()] for name in ("data", "indices", "indptr")]
    check_compressed(*parts, shape if kind == "csr" else shape[::-1], path, node.name)
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[kind](tuple(parts), shape=shape)
    return matrix.tocsr() if as_csr else matrix


def check_compressed(data, indices, indptr, shape: tuple[int, int], path, place: str) -> None:
    """Refuse the three arrays of a sparse matrix where they do not fit each other or `shape` (major, minor axis).

    scipy takes them as they are, and code that it has compiled then reads and writes outside of them.
    """
    data, indices, indptr = (np.asarray(part) for part in (data, indices, indptr))
    if data.dtype.kind not in "biuf" or indices.dtype.kind not in "iu" or indptr.dtype.kind not in "iu":
        what = f"data are {data.dtype}, indices {indices.dtype}, indptr {indptr.dtype}, not numbers and whole numbers"
    elif {data.ndim, indices.ndim, indptr.ndim} != {1} or len(indptr) != shape[0] + 1:
        what = f"indptr has the shape {indptr.shape}, not ({shape[0] + 1},), or another part is no vector"
    elif len(data) != len(indices):
        what = f"there are {len(data)} data and {len(indices)} indices"
    elif indptr[0] != 0 or not 0 <= int(indptr[-1]) <= len(data) or (indptr[1:] < indptr[:-1]).any():
        what = f"indptr does not rise from 0 to at most the {len(data)} data"
    elif len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < shape[1]:
        what = f"indices reach from {indices.min()} to {indices.max()}, and there are {shape[1]}"
    else:
        return
    raise Hdf5Error(path, f"{place} is no sparse matrix: {what}", _AGAIN)


def read_anndata(
    path: str | os.PathLike,
    *,
    obsm: Collection[str] = ("spatial",),
    layers: Collection[str] = (),
    uns: Collection[str] = ("spatial",),
    as_csr: bool = False,
) -> ad.AnnData:
    """Read X, obs and var of an ``.h5ad`` file, and of its other parts those named, where they are there.

    Of ``uns["spatial"]`` the pictures ``hires``, ``lowres`` and ``downscaled_fullres`` are read and the numbers that
    belong to them (`FACTORS`), nothing else.

    Parameters
    ----------
    path
        The file.
    obsm, layers, uns
        Names of the parts to read.
    as_csr
        Give X as CSR, however it is stored.

    Raises
    ------
    FileNotFoundError, Hdf5Error
        As `open_hdf5`; for a declared size out of proportion (`check_sizes`), parts that do not fit each other, and
        pictures of more than 50 million pixels.
    """
    path = Path(path)
    with open_hdf5(path) as file, _named(path, ".h5ad"):
        wanted = {"obsm": obsm, "layers": layers, "uns": uns}
        parts = {
            slot: {name: file[slot][name] for name in names if name in file[slot]}
            for slot, names in wanted.items()
            if isinstance(file.get(slot), h5py.Group)
        }
        if missing := {"obs", "var"} - set(file):
            raise Hdf5Error(path, f"{' and '.join(sorted(missing))} is missing", "Give a file that anndata wrote")
        matrices = [node for node in (file.get("X"), *parts.get("layers", {}).values()) if node is not None]
        # The arrays of a sparse matrix, for its type is none of those that anndata reads for us.
        arrays = [part for node in matrices for part in (node.values() if isinstance(node, h5py.Group) else [node])]
        pictures = _find_pictures(parts.get("uns", {}).pop("spatial", None), path)
        others = [node for slot in ("obsm", "uns") for node in parts.get(slot, {}).values()]
        check_sizes(
            path,
            [file["obs"], file["var"], *arrays, *others],
            [image for images, _ in pictures.values() for image in images.values()],
        )
        obs, var = read_table(file["obs"], path), read_table(file["var"], path)
        shape = (len(obs), len(var))
        found = {
            slot: {name: read_elem(node) for name, node in parts.get(slot, {}).items()} for slot in ("obsm", "uns")
        }
        if pictures:
            found["uns"]["spatial"] = {
                name: {"images": {key: image[()] for key, image in images.items()}, "scalefactors": factors}
                for name, (images, factors) in pictures.items()
            }
        return ad.AnnData(
            read_matrix(file["X"], path, shape, as_csr=as_csr) if "X" in file else None,
            obs=obs,
            var=var,
            layers={k: read_matrix(v, path, shape, as_csr=False) for k, v in parts.get("layers", {}).items()},
            **found,
        )


def read_obs(path: str | os.PathLike) -> pd.DataFrame:
    """Read the table of rows of an ``.h5ad`` file alone; errors are those of `read_anndata`."""
    path = Path(path)
    with open_hdf5(path) as file, _named(path, ".h5ad"):
        if "obs" not in file:
            raise Hdf5Error(path, "obs is missing", "Give a file that anndata wrote")
        check_sizes(path, [file["obs"]])
        return read_table(file["obs"], path)


def _find_pictures(node, path: Path) -> dict[str, tuple[dict[str, h5py.Dataset], dict[str, float]]]:
    """Return the known pictures of each library of ``uns["spatial"]``, not yet read, and their scale factors."""
    found = {}
    for name in node if isinstance(node, h5py.Group) else ():
        images, factors = (
            {key: part[key] for key in known if isinstance(part.get(key), h5py.Dataset)}
            if isinstance(part := node.get(f"{name}/{kind}"), h5py.Group)
            else {}
            for kind, known in (("images", PICTURES), ("scalefactors", FACTORS))
        )
        for image in images.values():
            shape = image.shape or ()
            if image.dtype.kind not in "buif" or len(shape) not in (2, 3) or not 0 < math.prod(shape[2:]) <= 4:
                fix = "It must be a picture of up to four colors"
                raise Hdf5Error(path, f"{image.name!r} is {image.dtype} {shape}", fix)
            if not 0 < math.prod(shape[:2]) <= PIXELS:
                what = f"{image.name!r} is a picture of {shape[1]:,} x {shape[0]:,} pixels"
                raise Hdf5Error(path, what, f"At most {PIXELS:,} are read: make it smaller, or leave it out")
        values = {}
        for key, factor in factors.items():
            one = factor.dtype.kind in "iuf" and factor.shape is not None and math.prod(factor.shape) == 1
            values[key] = float(np.ravel(factor[()])[0]) if one else np.nan
            if not 0 < values[key] < np.inf:
                raise Hdf5Error(path, f"{factor.name!r} is no number above 0", "Give the scale factor of Space Ranger")
        if images or values:
            found[name] = images, values
    return found


def _text(value) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


@contextmanager
def _named(path: Path, kind: str):
    """Name the file in whatever HDF5, anndata and pandas find wrong with it."""
    try:
        yield
    except (Hdf5Error, MemoryError):
        raise
    except Exception as error:
        raise Hdf5Error(
            path, f"cannot be read as {kind} ({describe_mismatch(path, {'hdf5'}) or error})", _AGAIN
        ) from error
