"""Read received HDF5 files without following links to other files, in memory limited by their size."""

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

LINKS, DEEPEST = 100_000, 64  # most links in a file, and levels of groups
PARTS = 10_000  # most groups and datasets that are read
FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
FLOOR, RATIO, LARGEST = 2**30, 256, 2**36  # memory limit in bytes: for any file, per byte of a file, and in all
CHUNK = 2**28  # bytes of a chunk, or of a part of a dataset read in parts
TEXT = 120  # bytes of memory that Python needs for a string beside its characters
PIXELS = 50_000_000  # of one image; the largest of Visium HD has 36 million
PICTURES = ("hires", "lowres", "downscaled_fullres")
FACTORS = ("spot_diameter_fullres", *(f"tissue_{name}_scalef" for name in PICTURES))
_ELEMENTS = {
    "", "array", "string-array", "string", "numeric-scalar", "dict", "dataframe", "categorical", "null",
    "nullable-integer", "nullable-boolean", "nullable-string-array", "rec-array",
}  # fmt: skip
_INSIDE = "Ask for a file that contains all of its data"
_AGAIN = "Download the file again"
_ALONE = "Give a file with the slide alone"
_ANNDATA = "Give a file that anndata wrote"


class Hdf5Error(ValueError):
    """Report a received HDF5 file that is refused; the message names the file, the place in it and the fix."""

    def __init__(self, path, problem: str, fix: str):
        super().__init__(f"{path}: {problem}. {fix}")
        self.path, self.problem, self.fix = path, problem, fix


def open_hdf5(path: str | os.PathLike) -> h5py.File:
    """Open a received HDF5 file for reading, after checking all of its links and datasets; no data are read.

    Raise `Hdf5Error` for a pipe, device or folder, invalid HDF5, soft, external and user-defined links, datasets with
    values in other files (external storage, virtual datasets), more than 100,000 links, and more than 64 nested groups.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise Hdf5Error(path, "is a pipe, a device or a folder, not a file", "Give the HDF5 file itself")
    try:
        file = h5py.File(path, "r")
    except (OSError, RuntimeError, ValueError) as error:
        seen = describe_mismatch(path, {"hdf5"}) or error
        raise Hdf5Error(path, f"cannot be read as HDF5 ({seen})", _AGAIN) from None
    try:
        with _name_file(path, "HDF5"):
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
            raise Hdf5Error(path, f"holds more than {LINKS:,} links", _ALONE)
        if depth >= DEEPEST:
            raise Hdf5Error(path, f"groups are nested more than {DEEPEST} deep", _ALONE)
        for name in names:
            kind = group.links.get_info(name).type
            place = f"{above}/{name.decode('utf-8', 'backslashreplace')}"
            if kind != h5py.h5l.TYPE_HARD or b"/" in name:
                kinds = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link to another file"}
                raise Hdf5Error(path, f"{place!r} is {kinds.get(kind, 'a link of an unknown kind')}", _INSIDE)
            child = h5py.h5o.open(group, name)
            address = h5py.h5o.get_info(child).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(child, h5py.h5g.GroupID):
                left.append((child, place, depth + 1))
            elif isinstance(child, h5py.h5d.DatasetID):
                properties = child.get_create_plist()
                if properties.get_layout() == h5py.h5d.VIRTUAL:
                    raise Hdf5Error(path, f"{place!r} is a virtual dataset: its values are in other files", _INSIDE)
                if properties.get_external_count():
                    raise Hdf5Error(path, f"the values of {place!r} are in another file (external storage)", _INSIDE)


def check_sizes(path: Path, nodes: Iterable[h5py.Group | h5py.Dataset], pictures: Iterable[h5py.Dataset] = ()) -> None:
    """Check that parts of a file need no more memory than its size allows, before they are read.

    Declared sizes count, at least 8 bytes per number: up to 1 GiB for any file, 256 bytes per byte of a larger one
    (gzip reaches a factor of 1,032, counts in a dense matrix about 200), and 64 GiB in all.
    """
    n_bytes, left, n_seen, texts = 0, [(node, 0) for node in nodes], 0, []
    size = path.stat().st_size
    most = min(FLOOR + RATIO * size, LARGEST)

    def count(dataset: h5py.Dataset, each: int) -> None:
        nonlocal n_bytes
        n_bytes += max(each * math.prod(dataset.shape or ()), _chunk_bytes(dataset))
        if n_bytes > most:
            shape = " x ".join(f"{n:,}" for n in dataset.shape)
            problem = f"{n_bytes:,} bytes would be read from a file of {size:,}; the limit is {most:,}"
            declared = f"{dataset.name!r} is declared as {shape} of {dataset.dtype}"
            raise Hdf5Error(path, f"{declared}: {problem}", f"Is it damaged? {_ALONE}")

    for picture in pictures:
        count(picture, picture.dtype.itemsize)
        check_packing(picture, path)
    while left:
        # Count an object once per link, as often as it would be read.
        node, depth = left.pop()
        if (n_seen := n_seen + 1) > PARTS or depth > DEEPEST:
            raise Hdf5Error(path, f"{node.name!r} has too many parts, or links to itself", _AGAIN)
        if isinstance(node, h5py.Group):
            if (kind := _text(node.attrs.get("encoding-type", ""))) not in _ELEMENTS:
                raise Hdf5Error(path, f"{node.name!r} is of type {kind!r}, which is not supported", "Remove it")
            left += [(node[name], depth + 1) for name in node]
        elif isinstance(node, h5py.Dataset):
            text = h5py.check_string_dtype(node.dtype)
            if text is None and node.dtype.kind not in "biufS":
                raise Hdf5Error(path, f"{node.name!r} holds neither numbers nor text", "Remove it")
            count(node, max(8, node.dtype.itemsize) + (TEXT if text else 0))
            check_packing(node, path)
            if text is not None and text.length is None:
                texts.append(node)
    for dataset in texts:
        _check_texts(dataset, path, size)


def check_packing(dataset: h5py.Dataset, path: Path) -> None:
    """Check that values need no library to be loaded, and have as many bytes as declared."""
    check_storage(dataset, path)
    if dataset.chunks is not None:
        chunks: list[h5py.h5d.StoreInfo] = []
        dataset.id.chunk_iter(chunks.append)
        for chunk in chunks:
            check_chunk(dataset, path, chunk)


def check_storage(dataset: h5py.Dataset, path: Path) -> None:
    """Check that a dataset has supported filters, chunks of at most 256 MiB, and no truncated values."""
    filters = _filters(dataset)
    if not FILTERS.keys() >= set(filters) or len(set(filters)) < len(filters) or {1, 32000} <= set(filters):
        names = ", ".join(FILTERS.get(number, f"no. {number}") for number in filters)
        raise Hdf5Error(path, f"{dataset.name!r} has unsupported filters ({names})", "Compress it with gzip")
    if _chunk_bytes(dataset) > CHUNK:  # reading one value decompresses its whole chunk
        problem = f"the chunks of {dataset.name!r}, {dataset.chunks}, hold more than {CHUNK:,} bytes"
        raise Hdf5Error(path, problem, "Rewrite it with smaller chunks (h5repack -l)")
    stored = dataset.id.get_storage_size()
    if dataset.chunks is None and 0 < stored < math.prod(dataset.shape or ()) * _item_bytes(dataset):
        raise Hdf5Error(path, f"{dataset.name!r} has fewer stored bytes than its shape needs", _AGAIN)


def check_chunk(dataset: h5py.Dataset, path: Path, chunk: h5py.h5d.StoreInfo) -> None:
    """Check that a chunk decompresses to its declared size.

    HDF5 does not: for a short chunk it returns whatever follows in memory, or crashes.
    """
    whole, filters = _chunk_bytes(dataset), _filters(dataset)
    used = [number for place, number in enumerate(filters) if not chunk.filter_mask & 1 << place]
    size = chunk.size
    if 1 in used or 32000 in used:
        packed, packs = memoryview(dataset.id.read_direct_chunk(chunk.chunk_offset)[1]), 1 if 1 in used else 32000
        if 3 in used[used.index(packs) :]:
            packed = packed[:-4]
        size = _gzip_size(packed, whole) if packs == 1 else _lzf_size(packed)
        used = used[: used.index(packs)]
    if size - 4 * (3 in used) != whole:
        raise Hdf5Error(path, f"a chunk of {dataset.name!r} decompresses to another size than declared", _AGAIN)


def _filters(dataset: h5py.Dataset) -> list[int]:
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]


def _gzip_size(packed: memoryview, whole: int) -> int:
    """Return the decompressed size of gzip data, or any size above `whole`; -1 if truncated."""
    unpack, size = zlib.decompressobj(), 0
    while not unpack.eof and size <= whole + 4:
        part = unpack.decompress(packed, 2**20)
        packed, size = unpack.unconsumed_tail, size + len(part)
        if not part and not packed:
            break
    return size if unpack.eof else -1 if size <= whole else size


def _lzf_size(packed: memoryview) -> int:
    """Return the decompressed size of LZF data (literal runs, copies of earlier bytes); -1 if truncated."""
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
    """Read rows of a dataset, checking each chunk (`check_chunk`) before its first use."""

    def __init__(self, dataset: h5py.Dataset, path: Path):
        self._dataset, self._path, self._checked = dataset, path, set()

    def __getitem__(self, row: int) -> np.ndarray:
        with _name_file(self._path, "HDF5"):
            if (chunks := self._dataset.chunks) is not None and (number := row // chunks[0]) not in self._checked:
                rest = (range(0, n, each) for n, each in zip(self._dataset.shape[1:], chunks[1:], strict=True))
                for offset in itertools.product([number * chunks[0]], *rest):
                    chunk = self._dataset.id.get_chunk_info_by_coord(offset)
                    if chunk.byte_offset is not None:  # otherwise the chunk is absent and has the fill value
                        check_chunk(self._dataset, self._path, chunk)
                self._checked.add(number)
            return self._dataset[row]


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    return math.prod(dataset.chunks) * _item_bytes(dataset) if dataset.chunks else 0


def _item_bytes(dataset: h5py.Dataset) -> int:
    """Return the bytes of a value in the file; for text of variable length, those of its length and address."""
    text = h5py.check_string_dtype(dataset.dtype)
    if text is not None and text.length is None:
        return 8 + dataset.file.id.get_create_plist().get_sizes()[0]
    return dataset.id.get_type().get_size()


def _check_texts(dataset: h5py.Dataset, path: Path, size: int) -> None:
    """Check that texts are together no longer than the file: each is stored once but may be used many times."""
    if not dataset.shape:  # one text
        return
    step, total = max(256, 2**29 // max(size, 1) // max(1, math.prod(dataset.shape[1:]))), 0
    for start in range(0, dataset.shape[0], step):
        total += sum(map(len, np.ravel(dataset[start : start + step])))
        if total > size:
            raise Hdf5Error(path, f"the texts of {dataset.name!r} are longer than the file", _AGAIN)


def read_table(node, path: Path) -> pd.DataFrame:
    """Read a table of an ``.h5ad`` file, after `check_sizes`."""
    if not isinstance(node, h5py.Group) or "_index" not in node.attrs:
        old = isinstance(node, h5py.Dataset)
        fix = "Read it with anndata 0.10 and write it again" if old else _ANNDATA
        raise Hdf5Error(path, "obs or var is not a table" + (" of anndata 0.7 or newer" if old else ""), fix)
    inside, columns = set(node), [_text(name) for name in node.attrs["column-order"]]
    length = None
    for name in (_text(node.attrs["_index"]), *columns):
        if name not in inside or columns.count(name) > 1:  # a name with a slash is a path to another group
            raise Hdf5Error(path, f"{node.name!r} must have its column {name!r} exactly once", _AGAIN)
        column = node[name]
        if isinstance(column, h5py.Group):
            column = column.get("codes", column.get("values"))
        shape = getattr(column, "shape", None) or ()
        length = length or shape
        if len(shape) != 1 or shape != length:
            raise Hdf5Error(path, f"column {name!r} of {node.name!r} does not have one value per row", _AGAIN)
        # Early versions of anndata stored the categories elsewhere, with a reference to them.
        if "categories" in node[name].attrs and _text(node.attrs.get("encoding-version")) == "0.1.0":
            reference = node[name].attrs["categories"]
            if not isinstance(reference, h5py.Reference) or node[reference].parent.name != f"{node.name}/__categories":
                raise Hdf5Error(path, f"the categories of '{node.name}/{name}' are in another group", _AGAIN)
    table = read_elem(node)
    if not isinstance(table, pd.DataFrame):
        raise Hdf5Error(path, f"{node.name!r} is not a table", _AGAIN)
    return table


def read_matrix(node, path: Path, shape: tuple[int, int], *, as_csr: bool) -> np.ndarray | sparse.spmatrix:
    """Read a matrix of numbers, after `check_sizes`; `as_csr` also converts a dense one, in parts.

    `shape` is that of the tables obs and var.
    """
    if isinstance(node, h5py.Dataset):
        if node.dtype.kind not in "biuf" or node.shape != shape:
            problem = f"{node.name!r} is {node.dtype} {node.shape}, not numbers {shape}"
            raise Hdf5Error(path, problem, "It must have one row per row of obs and one column per row of var")
        if not as_csr:
            return node[()]
        rows = max(1, CHUNK // max(1, shape[1] * node.dtype.itemsize))
        parts = [sparse.csr_matrix(node[start : start + rows]) for start in range(0, max(1, shape[0]), rows)]
        return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")
    kind = _text(node.attrs.get("encoding-type", ""))[:3]
    if kind not in ("csr", "csc"):
        raise Hdf5Error(path, f"{node.name!r} is neither dense nor sparse (csr, csc)", "Write it with anndata")
    declared = tuple(int(n) for n in np.ravel(node.attrs["shape"]))
    if declared != shape:
        raise Hdf5Error(path, f"{node.name!r} has the shape {declared}, obs and var give {shape}", _AGAIN)
    parts = [node[name][()] for name in ("data", "indices", "indptr")]
    check_compressed(*parts, shape if kind == "csr" else shape[::-1], path, node.name)
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[kind](tuple(parts), shape=shape)
    return matrix.tocsr() if as_csr else matrix


def check_compressed(data, indices, indptr, shape: tuple[int, int], path, place: str) -> None:
    """Check that the three arrays of a sparse matrix fit each other and `shape` (major, minor axis).

    scipy does not check them, and its compiled code would read and write out of bounds.
    """
    data, indices, indptr = (np.asarray(part) for part in (data, indices, indptr))
    if data.dtype.kind not in "biuf" or indices.dtype.kind not in "iu" or indptr.dtype.kind not in "iu":
        problem = f"data are {data.dtype}, indices {indices.dtype}, indptr {indptr.dtype}, not numbers and integers"
    elif {data.ndim, indices.ndim, indptr.ndim} != {1} or len(indptr) != shape[0] + 1:
        problem = f"indptr has the shape {indptr.shape}, not ({shape[0] + 1},), or another array is not one-dimensional"
    elif len(data) != len(indices):
        problem = f"there are {len(data)} data and {len(indices)} indices"
    elif indptr[0] != 0 or not 0 <= int(indptr[-1]) <= len(data) or (indptr[1:] < indptr[:-1]).any():
        problem = f"indptr does not rise from 0 to at most the {len(data)} data"
    elif len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < shape[1]:
        problem = f"indices reach from {indices.min()} to {indices.max()}, and there are {shape[1]}"
    else:
        return
    raise Hdf5Error(path, f"{place} is not a valid sparse matrix: {problem}", _AGAIN)


def read_anndata(
    path: str | os.PathLike,
    *,
    obsm: Collection[str] = ("spatial",),
    layers: Collection[str] = (),
    uns: Collection[str] = ("spatial",),
    as_csr: bool = False,
) -> ad.AnnData:
    """Read X (with `as_csr` always as CSR), obs and var of an ``.h5ad`` file, and the named other parts that it has.

    Of ``uns["spatial"]``, only the images in `PICTURES` and their scale factors (`FACTORS`) are read. Raise `Hdf5Error`
    as `open_hdf5`, and for sizes above the limit (`check_sizes`), inconsistent parts, and images of more than 50
    million pixels.
    """
    path = Path(path)
    with open_hdf5(path) as file, _name_file(path, ".h5ad"):
        requested = {"obsm": obsm, "layers": layers, "uns": uns}
        parts = {
            slot: {name: file[slot][name] for name in names if name in file[slot]}
            for slot, names in requested.items()
            if isinstance(file.get(slot), h5py.Group)
        }
        if missing := {"obs", "var"} - set(file):
            raise Hdf5Error(path, f"{' and '.join(sorted(missing))} is missing", _ANNDATA)
        matrices = [node for node in (file.get("X"), *parts.get("layers", {}).values()) if node is not None]
        # A sparse matrix is checked by its arrays; its own type is not in `_ELEMENTS`.
        arrays = [part for node in matrices for part in (node.values() if isinstance(node, h5py.Group) else [node])]
        pictures = _find_pictures(parts.get("uns", {}).pop("spatial", None), path)
        others = [node for slot in ("obsm", "uns") for node in parts.get(slot, {}).values()]
        images = [image for images, _ in pictures.values() for image in images.values()]
        check_sizes(path, [file["obs"], file["var"], *arrays, *others], images)
        obs, var = read_table(file["obs"], path), read_table(file["var"], path)
        shape = (len(obs), len(var))
        obsm, uns = ({name: read_elem(node) for name, node in parts.get(slot, {}).items()} for slot in ("obsm", "uns"))
        if pictures:
            uns["spatial"] = {
                name: {"images": {key: image[()] for key, image in images.items()}, "scalefactors": factors}
                for name, (images, factors) in pictures.items()
            }
        X = read_matrix(file["X"], path, shape, as_csr=as_csr) if "X" in file else None
        layers = {name: read_matrix(node, path, shape, as_csr=False) for name, node in parts.get("layers", {}).items()}
        return ad.AnnData(X, obs=obs, var=var, layers=layers, obsm=obsm, uns=uns)


def read_obs(path: str | os.PathLike) -> pd.DataFrame:
    """Read only the obs table of an ``.h5ad`` file; errors are those of `read_anndata`."""
    path = Path(path)
    with open_hdf5(path) as file, _name_file(path, ".h5ad"):
        if "obs" not in file:
            raise Hdf5Error(path, "obs is missing", _ANNDATA)
        check_sizes(path, [file["obs"]])
        return read_table(file["obs"], path)


def _find_pictures(node, path: Path) -> dict[str, tuple[dict[str, h5py.Dataset], dict[str, float]]]:
    """Return the known images of each library in ``uns["spatial"]``, not yet read, and their scale factors."""
    libraries = {}
    for name in node if isinstance(node, h5py.Group) else ():
        images, factors = (
            {key: part for key in known if isinstance(part := node.get(f"{name}/{kind}/{key}"), h5py.Dataset)}
            for kind, known in (("images", PICTURES), ("scalefactors", FACTORS))
        )
        for image in images.values():
            shape = image.shape or ()
            if image.dtype.kind not in "buif" or len(shape) not in (2, 3) or not 0 < math.prod(shape[2:]) <= 4:
                problem = f"{image.name!r} is {image.dtype} {shape}"
                raise Hdf5Error(path, problem, "It must be an image of up to four channels")
            if not 0 < math.prod(shape[:2]) <= PIXELS:
                problem = f"{image.name!r} is an image of {shape[1]:,} x {shape[0]:,} pixels"
                raise Hdf5Error(path, problem, f"At most {PIXELS:,} are read: make it smaller, or remove it")
        values = {}
        for key, factor in factors.items():
            one = factor.dtype.kind in "iuf" and factor.shape is not None and math.prod(factor.shape) == 1
            values[key] = float(np.ravel(factor[()])[0]) if one else np.nan
            if not 0 < values[key] < np.inf:
                raise Hdf5Error(path, f"{factor.name!r} is not a positive number", "Use Space Ranger's scale factor")
        if images or values:
            libraries[name] = images, values
    return libraries


def _text(value) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


@contextmanager
def _name_file(path: Path, kind: str):
    """Raise errors of HDF5, anndata and pandas as an `Hdf5Error` that names the file."""
    try:
        yield
    except (Hdf5Error, MemoryError):
        raise
    except Exception as error:
        seen = describe_mismatch(path, {"hdf5"}) or error
        raise Hdf5Error(path, f"cannot be read as {kind} ({seen})", _AGAIN) from error
