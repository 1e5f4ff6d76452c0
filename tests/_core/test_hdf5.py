"""Read received HDF5 files without data of other files, hangs, crashes or excessive memory."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import zlib

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse
from test_hest import write_slide
from test_predict import MeanColor
from test_visium import picture, sample, save, write_outs

from peka_lite.data import add_slide, read_counts, read_slide
from peka_lite.experiments import predict_spots

SECRET = np.frombuffer(b"the user's own key\n" * 40, "u1")
H5AD, PATCHES = "st/S1.h5ad", "patches/S1.h5"
IMAGE = "uns/spatial/ST/images/downscaled_fullres"
CHILD = """
import json, os, resource, signal, sys
import anndata as ad
from peka_lite.data.expression import qc
from peka_lite.experiments._predict_from import fold_without
from peka_lite.data.hest import read_cohort
from peka_lite.maps.tissue import save_predicted_map
from peka_lite.data.visium import add_slide
from peka_lite.experiments.run import load_run
from peka_lite.data._space_ranger import read_counts
from peka_lite.data.tiles import TileStore

def slide(root):
    cohort = qc(read_cohort(root), min_genes=0)
    cohort.adata.X.toarray(), cohort.tiles[:]

def counts(path):
    got = read_counts(path)
    got.X[::-1].tocsc().sum(), got.X.toarray()

def add(path):  # as from another package's reader
    add_slide(path + ".cohort", "S1", ad.read_h5ad(path), path + ".tif")

def tiles(path):
    TileStore([path], [0], [0])[:]

def draw(path):
    save_predicted_map(path, path + ".png")

for line in sys.stdin:
    name, path = json.loads(line)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**31,) * 2)
        signal.alarm(20)
        try:
            globals()[name](path)
            message = "read"
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writer, message[:4000].encode("utf-8", "replace"))
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        message = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(message if status == 0 else f"ended by {status}"), flush=True)
"""


@pytest.fixture(scope="module")
def check_refused():
    """Return a function that checks the errors of calls in a process with 2 GiB more memory and 20 seconds.

    It takes a mapping to (function, path, file, words). The message must be one line with the file and the words.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("memory limits are set as on Linux")
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def check(jobs):
        failures = {}
        for name, (how, path, file, words) in jobs.items():
            print(json.dumps((how, str(path))), file=child.stdin, flush=True)
            message = json.loads(child.stdout.readline())
            kinds = (f"HestFormatError: {file}: ", f"Hdf5Error: {file}: ", f"ValueError: {file} is not a regular file")
            if not message.startswith(kinds) or words not in message or "\n" in message:
                failures[name] = message
        assert not failures

    with child:
        yield check
        child.stdin.close()


def replace(file, name, **options):
    """Replace a dataset, keeping its attributes."""
    attrs = dict(file[name].attrs)
    del file[name]
    data = file.create_dataset(name, **options)
    data.attrs.update(attrs)
    return data


def full_slide(root):
    """Write a slide with columns, a category, an image and parts that are not read."""
    write_slide(root)
    adata = ad.read_h5ad(root / H5AD)
    adata.obs["array_row"] = np.arange(4, dtype="u1")
    adata.obs["domain"] = ["a", "a", "b", "b"]
    adata.var["n"] = np.arange(6, dtype="u1")
    library = {"images": {"downscaled_fullres": np.zeros((4, 4, 3), "u1")}}
    library["scalefactors"] = {"spot_diameter_fullres": 2.0, "tissue_downscaled_fullres_scalef": 1.0}
    adata.uns = {"spatial": {"ST": library}, "other": np.arange(4)}
    adata.raw = adata.copy()
    adata.write_h5ad(root / H5AD)
    with h5py.File(root / PATCHES, "a") as file:
        file["notes/own"] = np.arange(3)
    return root


# --- values in other files -----------------------------------------------------------------------------------------

WORDS = {
    "external storage": "are in another file (external storage)",
    "virtual dataset": "is a virtual dataset: its values are in other files",
    "virtual dataset of a pipe": "is a virtual dataset: its values are in other files",
    "external link": "is a link to another file",
    "link to a pipe": "is a link to another file",
    "soft link": "is a soft link",
}
PLACES = {
    H5AD: {
        "obs/array_row": (4,),
        "obs/domain/codes": (4,),
        "var/n": (6,),
        IMAGE: (4, 4, 3),
        "uns/spatial/ST/scalefactors/spot_diameter_fullres": (),
        "uns/other": (4,),
        "X/data": (23,),
        "obsm/spatial": (4, 2),
        "raw/X/data": (23,),
    },
    PATCHES: {"img": (4, 224, 224, 3), "barcode": (4, 1), "notes/own": (3,)},
}


def move_out(file, how, name, shape, folder):
    """Replace a dataset by one with values in another file."""
    attrs = dict(file[name].attrs)
    del file[name]
    if how == "external storage":
        file.create_dataset(name, shape or (1,), "u1", external=[(str(folder / "secret"), 0, h5py.h5f.UNLIMITED)])
    elif "virtual" in how:
        layout = h5py.VirtualLayout(shape=shape or (1,), dtype="u1")
        layout[:] = h5py.VirtualSource(folder / ("pipe" if "pipe" in how else "secret.h5"), "d", shape=shape or (1,))
        file.create_virtual_dataset(name, layout)
    elif how == "soft link":
        file[name] = h5py.SoftLink("/obsm")
        return
    else:
        file[name] = h5py.ExternalLink(folder / ("pipe" if "pipe" in how else "secret.h5"), "/d")
        return
    file[name].attrs.update(attrs)


@pytest.mark.parametrize("name", PLACES)
def test_values_in_other_files_are_refused_everywhere(check_refused, tmp_path, name):
    (tmp_path / "secret").write_bytes(SECRET.tobytes() * 1000)
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["d"] = np.resize(SECRET, (4, 224, 224, 3))
    os.mkfifo(tmp_path / "pipe")
    jobs, whole = {}, full_slide(tmp_path / "whole")
    for i, (how, words) in enumerate(WORDS.items()):
        for j, (place, shape) in enumerate(PLACES[name].items()):
            root = shutil.copytree(whole, tmp_path / f"{i}_{j}")
            with h5py.File(root / name, "a") as file:
                move_out(file, how, place, shape, tmp_path)
            jobs[how, place] = "slide", root, root / name, words
            if how == "external storage" and place in ("obs/array_row", IMAGE):
                jobs["counts", place] = "counts", root / name, root / name, words
                jobs["draw", place] = "draw", root / name, root / name, words
    check_refused(jobs)
    assert read_slide(whole, "S1").adata.obs["domain"].tolist() == ["a", "a", "b", "b"]


def test_links_and_external_storage_are_refused_in_every_kind_of_file(check_refused, tmp_path):
    (tmp_path / "secret").write_bytes(SECRET.tobytes() * 1000)
    os.mkfifo(tmp_path / "pipe.h5ad")
    os.mkfifo(tmp_path / "pipe.h5")
    outs = write_outs(tmp_path / "outs", sample(0.5))
    matrix = outs / "filtered_feature_bc_matrix.h5"
    with h5py.File(matrix, "a") as file:
        n = file["matrix/data"].shape
        replace(file, "matrix/data", shape=n, dtype="u1", external=[(str(tmp_path / "secret"), 0, n[0])])
    root = full_slide(tmp_path / "slide")
    with h5py.File(root / PATCHES, "a") as file:
        move_out(file, "virtual dataset", "img", (4, 224, 224, 3), tmp_path)
    storage = "are in another file (external storage)"
    check_refused(
        {
            "Space Ranger": ("counts", outs, matrix, storage),
            "tiles": ("tiles", root / PATCHES, root / PATCHES, "'/img' is a virtual dataset"),
            "a pipe of tiles": ("tiles", tmp_path / "pipe.h5", tmp_path / "pipe.h5", "is a pipe, a device or a folder"),
        }
    )


def test_pipe_instead_of_predictions_does_not_hang(check_refused, tmp_path, write_run):
    run = write_run("one")
    (run / "predictions.h5ad").unlink(missing_ok=True)
    os.mkfifo(run / "predictions.h5ad")
    path = run / "predictions.h5ad"
    check_refused({"a run": ("load_run", run, path, "is not a regular file; remove it, or put the file there")})


def test_parts_that_are_not_read_may_be_malformed(tmp_path):
    root = full_slide(tmp_path)
    with h5py.File(root / H5AD, "a") as file:
        file["uns/again"] = file["uns"]  # a loop
        file["uns/huge"] = np.zeros(3)
        replace(file, "uns/huge", shape=(10**12,), dtype="f8", chunks=(10**6,))
        file["uns/type"] = np.dtype("f4")
        file["obsm/twice"] = file["obsm/spatial"]
        file["uns/reference"] = file["X"].ref
        file[IMAGE.replace("downscaled_fullres", "own")] = np.zeros((2, 2))
        file["uns/spatial/ST/metadata"] = "of the chip"
    slide = read_slide(root, "S1")
    assert list(slide.adata.uns) == ["spatial"]
    assert list(slide.adata.obsm) == ["spatial"]
    assert list(slide.adata.uns["spatial"]["ST"]["images"]) == ["downscaled_fullres"]
    assert set(slide.adata.uns["spatial"]["ST"]) == {"images", "scalefactors"}
    assert list(slide.adata.obs) == ["array_row", "domain"]


def test_filters_of_h5py_and_count_formats_of_anndata_are_read(tmp_path):
    whole = read_slide(write_slide(tmp_path / "whole"), "S1").adata.X.toarray()
    kinds = {"dense": np.asarray, "csc": sparse.csc_matrix, "int": lambda X: sparse.csr_matrix(X, dtype=np.int64)}
    for packing in ("gzip", "lzf", None):
        for kind, change in kinds.items():
            root = write_slide(tmp_path / f"{packing}_{kind}", X=change(whole))
            ad.read_h5ad(root / H5AD).write_h5ad(root / H5AD, compression=packing)
            with h5py.File(root / PATCHES, "a") as file:
                tiles = file["img"][()]
                replace(file, "img", data=tiles, compression=packing, shuffle=True, fletcher32=True)
            slide = read_slide(root, "S1")
            assert (slide.adata.X.format, slide.adata.X.dtype) == ("csr", np.float32)
            assert np.array_equal(slide.adata.X.toarray(), whole)
            assert np.array_equal(slide.tiles[:], tiles)


# --- declared sizes ------------------------------------------------------------------------------------------------


def bomb(n_bytes):
    """Return zeros compressed by gzip, without the time to compress so many; the final checksum is missing."""
    pack = zlib.compressobj(9)
    head, part = pack.flush(zlib.Z_FULL_FLUSH), 2**24
    return head + (pack.compress(bytes(part)) + pack.flush(zlib.Z_FULL_FLUSH)) * (n_bytes // part)


def put_bomb(file, name, shape, dtype):
    data = replace(file, name, shape=shape, dtype=dtype, chunks=shape, compression="gzip")
    data.id.write_direct_chunk((0,) * len(shape), bomb(2**32))


def put_short(file, name, shape, **packing):
    """Store chunks that decompress to 8 bytes, which HDF5 would use for all of their values."""
    data = replace(file, name, shape=shape, dtype="u1", chunks=shape, **packing)
    raw = b"\5" * 8
    lzf = bytes([7]) + raw  # a literal run of 8 bytes
    packed = zlib.compress(raw) if packing.get("compression") == "gzip" else lzf if packing.get("compression") else raw
    data.id.write_direct_chunk((0,) * len(shape), packed)


def replace_column(file, **options):
    replace(file, "obs/array_row", **options)


def unknown_filter(file, name, shape):
    attrs = dict(file[name].attrs)
    del file[name]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(shape)
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)  # zstd, for which HDF5 would load a library
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.NATIVE_UINT8, space, dcpl=properties).write_direct_chunk(
        (0,) * len(shape), b"x" * 9
    )
    file[name].attrs.update(attrs)


def one_text_many_times(path):
    """Let each of 60,000 entries of a column refer to one text of a megabyte, as HDF5 allows."""
    n, long = 60_000, "x" * 2**20
    with h5py.File(path, "a") as file:
        replace(file, "obs/_index", data=[long] + ["y"] * (n - 1), dtype=h5py.string_dtype())
        start = file["obs/_index"].id.get_offset()
    raw = bytearray(path.read_bytes())
    raw[start : start + 16 * n] = raw[start : start + 16] * n
    path.write_bytes(raw)


HUGE = {
    "picture": (H5AD, lambda f: replace(f, IMAGE, shape=(60_000, 60_000, 3), dtype="u1", chunks=(64, 64, 3)), "60,000"),
    "picture of one row": (H5AD, lambda f: replace(f, IMAGE, shape=(1, 10**10, 3), dtype="u1"), "is an image of"),
    "small picture of a huge type": (H5AD, lambda f: replace(f, IMAGE, shape=(9, 9), dtype="S99999999"), "It must be"),
    "a hundred pictures": (
        H5AD,
        lambda f: [f.create_dataset(f"uns/spatial/L{i}/images/hires", (7000, 7000, 3), "u1") for i in range(100)],
        "the limit is",
    ),
    "column": (H5AD, lambda f: replace_column(f, shape=(10**9,), dtype="f8"), "row' is declared as 1,000,000,000"),
    "index": (H5AD, lambda f: replace(f, "obs/_index", shape=(10**9,), dtype=h5py.string_dtype()), "obs/_index"),
    "long texts": (H5AD, lambda f: replace(f, "obs/_index", shape=(10**4,), dtype="S1000000"), "obs/_index"),
    "categories": (H5AD, lambda f: replace(f, "obs/domain/categories", shape=(10**9,), dtype="S1"), "categories"),
    "codes": (H5AD, lambda f: replace(f, "obs/domain/codes", shape=(10**10,), dtype="i1"), "codes"),
    "counts": (H5AD, lambda f: replace(f, "X/data", shape=(10**10,), dtype="f4"), "'/X/data' is declared"),
    "indptr": (H5AD, lambda f: replace(f, "X/indptr", shape=(10**10,), dtype="i4"), "'/X/indptr' is declared"),
    "dense bytes": (H5AD, lambda f: replace_dense(f, (4, 10**9)), "'/X' is declared as 4 x 1,000,000,000"),
    "centers": (H5AD, lambda f: replace(f, "obsm/spatial", shape=(4, 10**9), dtype="f8"), "obsm/spatial"),
    "chunk": (
        H5AD,
        lambda f: replace_column(f, shape=(4,), maxshape=(None,), dtype="u1", chunks=(2**32 - 1,), compression="gzip"),
        "obs/array_row",
    ),
    "gzip column": (H5AD, lambda f: put_bomb(f, "obs/array_row", (4,), "u1"), "decompresses to another size than"),
    "gzip picture": (H5AD, lambda f: put_bomb(f, IMAGE, (4, 4, 3), "u1"), "decompresses to another size than"),
    "gzip tiles": (PATCHES, lambda f: put_bomb(f, "img", (4, 224, 224, 3), "u1"), "decompresses to another size than"),
    "barcodes": (PATCHES, lambda f: huge_patches(f), "is declared as 1,000,000,000"),
    "many barcodes": (PATCHES, lambda f: replace(f, "barcode", shape=(10**10,), dtype="S8"), "codes for 4"),
    "chunk of tiles": (
        PATCHES,
        lambda f: replace(f, "img", shape=(4, 224, 224, 3), maxshape=(None, 224, 224, 3), dtype="u1",
                          chunks=(20_000, 224, 224, 3)),
        "the chunks of '/img'",
    ),
    "filter of tiles": (PATCHES, lambda f: unknown_filter(f, "img", (4, 224, 224, 3)), "unsupported filters"),
    "filter of a column": (H5AD, lambda f: unknown_filter(f, "obs/array_row", (4,)), "unsupported filters"),
    "deep": (H5AD, lambda f: f.create_group("uns/other2/" + "a/" * 3000), "nested more than 64 deep"),
    "a column elsewhere": (H5AD, lambda f: f["obs"].attrs.create("column-order", ["/uns/other"]), "'/uns/other'"),
    "column of records": (H5AD, lambda f: replace_column(f, data=np.zeros(4, [("a", "i4")])), "neither numbers nor"),
    "column of bytes": (H5AD, lambda f: replace_column(f, data=np.zeros(4, "V8")), "neither numbers nor text"),
    "column of one value": (H5AD, lambda f: replace_column(f, data=1.0), "does not have one value per row"),
    "column without values": (H5AD, lambda f: replace_column(f, data=h5py.Empty("i4")), "not have one value per row"),
    "places of records": (
        H5AD,
        lambda f: replace(f, "obsm/spatial", data=np.zeros((4, 2), [("a", "i4"), ("b", "i4")])),
        "neither numbers nor text",
    ),
    "places far away": (H5AD, lambda f: replace(f, "obsm/spatial", data=np.full((4, 2), 1e300)), "beyond 1e9 pixels"),
    "bombs together": (
        H5AD,
        lambda f: [
            replace(f, "X/data", shape=(64,), dtype="f4", chunks=(4,), compression="gzip").id.write_direct_chunk(
                (i,), bomb(2**30)
            )
            for i in range(0, 64, 4)
        ],
        "decompresses to another size than",
    ),
    **{
        f"short {place.rpartition('/')[2]}, {words}": (
            name,
            lambda f, place=place, shape=shape, packing=packing: put_short(f, place, shape, **packing),
            "decompresses to another size than",
        )
        for name, place, shape in (
            (H5AD, IMAGE, (5000, 5000, 3)), (H5AD, "obs/array_row", (4,)), (PATCHES, "img", (4, 224, 224, 3)),
        )
        for words, packing in {
            "gzip": {"compression": "gzip"}, "lzf": {"compression": "lzf"}, "plain": {"shuffle": True},
            "gzip with a sum": {"compression": "gzip", "shuffle": True, "fletcher32": True},
        }.items()
        if shape != (4,) or "sum" in words or words == "gzip"  # 8 bytes are more than 4
    },
    "column of vectors": (H5AD, lambda f: replace_column(f, shape=(4,), dtype=h5py.vlen_dtype("f8")), "neither"),
}  # fmt: skip


def replace_dense(file, shape):
    del file["X"]
    file.create_dataset("X", shape, "u1", chunks=(1, 10**6), compression="gzip")
    file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def huge_patches(file):
    replace(file, "img", shape=(10**9, 224, 224, 3), dtype="u1", chunks=(1, 224, 224, 3))
    replace(file, "barcode", shape=(10**9,), dtype="S8", chunks=(10**4,))


def test_excessive_declared_sizes_are_refused(check_refused, tmp_path):
    jobs, whole = {}, full_slide(tmp_path / "whole")
    for i, (case, (name, change, words)) in enumerate(HUGE.items()):
        root = shutil.copytree(whole, tmp_path / str(i))
        with h5py.File(root / name, "a") as file:
            change(file)
        jobs[case] = "slide", root, root / name, words
    root = full_slide(tmp_path / "text")
    one_text_many_times(root / H5AD)
    jobs["one text"] = "slide", root, root / H5AD, "the texts of '/obs/_index' are longer than the file"
    check_refused(jobs)


def test_links_are_counted_before_they_are_followed(tmp_path, monkeypatch):
    root = full_slide(tmp_path)
    read_slide(root, "S1")
    monkeypatch.setattr("peka_lite._core.hdf5.LINKS", 70)
    with h5py.File(root / H5AD, "a") as file:
        for i in range(70):
            file[f"uns/{i}"] = file["X"]
    with pytest.raises(ValueError, match=r"S1\.h5ad: holds more than 70 links\. Give a file with the slide alone"):
        read_slide(root, "S1")


def test_groups_linked_many_times_are_refused(check_refused, tmp_path):
    path = full_slide(tmp_path) / H5AD
    with h5py.File(path, "a") as file:
        group = file.create_group("uns/peka_lite")
        for _ in range(40):  # 2**40 paths to the last
            group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
            below = group.create_group("a")
            group["b"] = below
            group = below
    check_refused({"draw": ("draw", path, path, "has too many parts, or links to itself")})


# --- malformed sparse counts ---------------------------------------------------------------------------------------


def change_matrix(file, at, field, how):
    """Corrupt one field of a sparse matrix of 4 or more rows."""
    group = file[at]
    values = group[field][()]
    corrupt = {
        "-5": np.r_[values[:1], -5, values[2:]],
        "2**30": np.r_[values[:1], 2**30, values[2:]],
        "falls": np.r_[values[:1], values[3], values[2:]],
        "first": np.r_[1, values[1:]],
        "last": np.r_[values[:-1], 10**6],
        "short": values[:-1],
        "long": np.r_[values, values[-1]],
        "beyond": np.r_[10**6, values[1:]],
        "far beyond": np.r_[np.int64(2**40), values[1:]],
        "unsigned": np.r_[np.uint64(2**63), values[1:].astype(np.uint64)],
        "one beyond": np.r_[10**3, values[1:]],
        "negative": np.r_[-1, values[1:]],
        "fractions": values + 0.5,
        "text": values.astype("S9"),
        "table": np.stack([values, values]),
        "none": values[:0],
    }[how]
    del group[field]
    group[field] = corrupt


BROKEN = [
    *[("indptr", how) for how in ("-5", "2**30", "falls", "first", "last", "short", "long", "fractions", "none")],
    *[("indices", how) for how in ("beyond", "far beyond", "unsigned", "one beyond", "negative", "fractions", "short")],
    *[("data", how) for how in ("short", "text", "table", "none")],
]


def test_malformed_sparse_counts_are_refused_before_rows_are_selected(check_refused, tmp_path):
    jobs = {}
    X = sparse.csr_matrix(np.arange(24, dtype=np.float32).reshape(4, 6))
    for kind, matrix in {"csr": X, "csc": X.tocsc()}.items():
        whole = write_slide(tmp_path / kind, X=matrix)
        for field, how in BROKEN:
            root = shutil.copytree(whole, tmp_path / f"{kind}_{field}_{how}")
            with h5py.File(root / H5AD, "a") as file:
                change_matrix(file, "X", field, how)
            jobs[kind, field, how] = "slide", root, root / H5AD, "/X is not a valid sparse matrix: "
            jobs["counts", kind, field, how] = "counts", root / H5AD, root / H5AD, "/X is not a valid sparse matrix: "
        for shape in ([-4, 6], [4, 2**40], [4, 5], [5, 6], [0, 0], [4], [4, 6, 1]):
            root = shutil.copytree(whole, tmp_path / f"{kind}_{'x'.join(map(str, shape))}")
            with h5py.File(root / H5AD, "a") as file:
                file["X"].attrs["shape"] = shape
            jobs[kind, *shape] = "slide", root, root / H5AD, "'/X' has the shape"
    check_refused(jobs)


def test_malformed_counts_in_memory_are_refused_by_add(check_refused, tmp_path):
    jobs = {}
    for i, (field, how) in enumerate([*BROKEN[:3], ("indices", "beyond"), ("indices", "negative")]):
        path = tmp_path / f"{i}.h5ad"
        sample(0.5).write_h5ad(path)
        save(tmp_path / f"{i}.h5ad.tif", picture(0.5), mpp=0.5)
        with h5py.File(path, "a") as file:
            change_matrix(file, "X", field, how)
        jobs[field, how] = "add", path, "counts of S1", "is not a valid sparse matrix"
    check_refused(jobs)
    assert not list(tmp_path.glob("*.cohort"))


def test_malformed_matrices_of_space_ranger_are_refused(check_refused, tmp_path):
    jobs = {}
    for i, (field, how) in enumerate(BROKEN):
        outs = write_outs(tmp_path / str(i), sample(0.5))
        path = outs / "filtered_feature_bc_matrix.h5"
        with h5py.File(path, "a") as file:
            change_matrix(file, "matrix", field, how)
        jobs[field, how] = "counts", outs, path, "cannot be read as Space Ranger's matrix ("
    for shape in ([8, 10**12], [-8, 25], [8, 24], [7, 25], [8]):
        outs = write_outs(tmp_path / f"shape{'x'.join(map(str, shape))}", sample(0.5))
        path = outs / "filtered_feature_bc_matrix.h5"
        with h5py.File(path, "a") as file:
            del file["matrix/shape"]
            file["matrix/shape"] = shape
        jobs[tuple(shape)] = "counts", outs, path, "its shape is"
    check_refused(jobs)


def write_mtx(outs, text, *, matrix=None):
    """Replace the HDF5 file by a folder of text files."""
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    folder = outs / "filtered_feature_bc_matrix"
    folder.mkdir()
    tables = {
        "features": "".join(f"ENSG{i}\tG{i}\tGene Expression\n" for i in range(8)),
        "barcodes": "".join(f"SPOT{i}-1\n" for i in range(25)),
    }
    for name, table in tables.items():
        (folder / f"{name}.tsv.gz").write_bytes(gzip.compress(table.encode()))
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress(text.encode()) if matrix is None else matrix)
    return folder / "matrix.mtx.gz"


HEAD = "%%MatrixMarket matrix coordinate integer general\n%metadata\n"
MTX = {
    "8 25 1000000000000\n1 1 1\n": "declares 1,000,000,000,000 counts",
    "8 25 -1\n": "declares -1 counts",
    "8 1000000000000 1\n1 1 1\n": "is declared as [8, 1000000000000, 1], with 8 features and 25 barcodes",
    "8 25 1\n9 1 1\n": "cannot be read as MatrixMarket",
    "8 25 1\n0 1 1\n": "cannot be read as MatrixMarket",
    "8 25 1\n-1 1 1\n": "cannot be read as MatrixMarket",
    "8 25 2\n1 1 1\n": "cannot be read as MatrixMarket",
    "8 25 1\n1 1 x\n": "cannot be read as MatrixMarket",
    "8 25\n1 1 1\n": "is declared as [8, 25]",
    "eight\n": "cannot be read as MatrixMarket",
}


def test_malformed_matrix_market_folders_are_refused(check_refused, tmp_path):
    jobs = {}
    for i, (text, words) in enumerate(MTX.items()):
        outs = write_outs(tmp_path / str(i), sample(0.5))
        jobs[text] = "counts", outs, write_mtx(outs, HEAD + text), words
    for kind in ("array integer general", "coordinate complex general", "coordinate pattern general",
                 "coordinate integer symmetric"):  # fmt: skip
        outs = write_outs(tmp_path / kind.replace(" ", "_"), sample(0.5))
        path = write_mtx(outs, f"%%MatrixMarket matrix {kind}\n8 25 1\n1 1 1\n")
        jobs[kind] = "counts", outs, path, "is not a matrix of counts"
    outs = write_outs(tmp_path / "bomb", sample(0.5))
    pack = gzip.compress((HEAD + "8 25 1\n").encode(), mtime=0)
    pack += b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + zlib_raw(2**33)
    jobs["bomb"] = "counts", outs, write_mtx(outs, "", matrix=pack), "decompresses to more bytes"
    check_refused(jobs)
    outs = write_outs(tmp_path / "good", sample(0.5))
    write_mtx(outs, HEAD + "8 25 2\n1 1 3\n8 25 4\n")
    read = read_counts(outs)
    assert (read.shape, read.X[0, 0], read.X[24, 7], read.X.sum()) == ((25, 8), 3, 4, 7)
    assert list(read.var) == ["gene_ids", "feature_types"]


def zlib_raw(n_bytes):
    pack = zlib.compressobj(9, wbits=-15)
    part = 2**24
    return (pack.compress(b"1" * part) + pack.flush(zlib.Z_FULL_FLUSH)) * (n_bytes // part)


# --- data in outputs -----------------------------------------------------------------------------------------------


def test_predictions_contain_only_positions_and_images(tmp_path):
    root = full_slide(tmp_path / "c")
    with h5py.File(root / H5AD, "a") as file:
        file["uns/spatial/ST/images/own"] = SECRET[:48].reshape(4, 4, 3)
        file["uns/spatial/ST/scalefactors/own"] = 3.0
        file["uns/spatial/ST/metadata"] = "of the chip"
    out = tmp_path / "p.h5ad"
    predict_spots(read_slide(root, "S1"), MeanColor(), out, device="cpu")
    with h5py.File(out) as file:
        assert set(file["obs"]) == {"_index", "array_row"}
        assert set(file["uns"]) == {"spatial", "peka_lite"}
        assert set(file["uns/spatial/ST"]) == {"images", "scalefactors"}
        assert set(file["uns/spatial/ST/images"]) == {"downscaled_fullres", "hires"}
        factors = {name: float(value[()]) for name, value in file["uns/spatial/ST/scalefactors"].items()}
    names = ("spot_diameter_fullres", "tissue_downscaled_fullres_scalef", "tissue_hires_scalef")
    assert factors == dict(zip(names, (2.0, 1.0, 1.0), strict=True))


@pytest.mark.parametrize("value", [-1.0, 0.0, np.nan, np.inf, [1.0, 2.0], "x"])
def test_scale_factors_must_be_positive(tmp_path, value):
    root = full_slide(tmp_path)
    with h5py.File(root / H5AD, "a") as file:
        del file["uns/spatial/ST/scalefactors/spot_diameter_fullres"]
        file["uns/spatial/ST/scalefactors/spot_diameter_fullres"] = value
    with pytest.raises(
        ValueError, match=r"S1\.h5ad: '/uns/spatial/ST/scalefactors/spot_diameter_fullres' is not a pos"
    ):
        read_slide(root, "S1")


def test_added_slides_contain_only_positions_and_gene_names(tmp_path):
    counts = sample(0.5)
    counts.obs["note"], counts.obs["n"] = "private", 1
    counts.var["gene_ids"], counts.var["note"] = [f"ENSG{i}" for i in range(8)], "private"
    counts.uns["note"], counts.obsm["other"] = "private", np.ones((counts.n_obs, 3))
    counts.obsm["spatial"] = np.column_stack([counts.obsm["spatial"], np.arange(counts.n_obs)])
    slide = add_slide(tmp_path / "c", "S1", counts, save(tmp_path / "a.tif", picture(0.5), mpp=0.5))
    assert list(slide.adata.obs) == ["in_tissue", "array_row", "array_col"]
    assert slide.adata.var["gene_ids"].tolist() == [f"ENSG{i}" for i in range(8)]
    with h5py.File(tmp_path / "c" / "st" / "S1.h5ad") as file:
        assert set(file["obs"]) == {"_index", "in_tissue", "array_row", "array_col"}
        assert set(file["var"]) == {"_index", "gene_ids"}
        assert (set(file["uns"]), set(file["obsm"])) == ({"spatial"}, {"spatial"})
        assert file["obsm/spatial"].shape[1] == 2
