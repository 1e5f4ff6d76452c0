"""Received HDF5 files: nothing of another file comes in, nothing hangs, crashes or fills memory; the rest is read."""

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

from peka_lite.data._space_ranger import read_counts
from peka_lite.data.hest import read_slide
from peka_lite.data.visium import add_slide
from peka_lite.experiments.predict import predict_spots

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
    how, path = json.loads(line)
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**31,) * 2)
        signal.alarm(20)
        try:
            globals()[how](path)
            said = "read"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(theirs, said[:4000].encode("utf-8", "replace"))
        os._exit(0)
    os.close(theirs)
    with open(ours, encoding="utf-8") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(said if status == 0 else f"ended by {status}"), flush=True)
"""


@pytest.fixture(scope="module")
def check_refused():
    """Return a function that does (how, path) in a process with 2 GiB more and 20 seconds.

    One sentence must name the file and hold the words that follow.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("limits of memory are set as on Linux")
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def check(jobs):
        wrong = {}
        for name, (how, path, file, words) in jobs.items():
            print(json.dumps((how, str(path))), file=child.stdin, flush=True)
            said = json.loads(child.stdout.readline())
            kinds = (f"HestFormatError: {file}: ", f"Hdf5Error: {file}: ", f"ValueError: {file} is no regular file")
            if not said.startswith(kinds) or words not in said or "\n" in said:
                wrong[name] = said
        assert not wrong

    with child:
        yield check
        child.stdin.close()


def replace(file, name, **made):
    """Make a dataset again, with the attributes it had."""
    attrs = dict(file[name].attrs)
    del file[name]
    data = file.create_dataset(name, **made)
    data.attrs.update(attrs)
    return data


def full_slide(root):
    """A slide with columns, a category, a picture and parts that are not read."""
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


# --- what lies in other files --------------------------------------------------------------------------------------

WORDS = {
    "external storage": "lie in another file (external storage)",
    "virtual dataset": "is a virtual dataset: its values lie in other files",
    "virtual dataset of a pipe": "is a virtual dataset: its values lie in other files",
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
    """Let a dataset take its values from another file."""
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
def test_values_that_lie_in_other_files_are_refused_wherever_they_stand(check_refused, tmp_path, name):
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


def test_links_and_storage_elsewhere_are_found_in_every_kind_of_file(check_refused, tmp_path):
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
    storage = "lie in another file (external storage)"
    check_refused(
        {
            "Space Ranger": ("counts", outs, matrix, storage),
            "tiles": ("tiles", root / PATCHES, root / PATCHES, "'/img' is a virtual dataset"),
            "a pipe of tiles": ("tiles", tmp_path / "pipe.h5", tmp_path / "pipe.h5", "is no file but a pipe"),
        }
    )


def test_a_pipe_in_the_place_of_predictions_does_not_hang(check_refused, tmp_path, write_run):
    run = write_run("one")
    (run / "predictions.h5ad").unlink(missing_ok=True)
    os.mkfifo(run / "predictions.h5ad")
    path = run / "predictions.h5ad"
    check_refused({"a run": ("load_run", run, path, "is no regular file; remove it, or put the file there")})


def test_parts_that_are_not_read_may_be_what_they_are(tmp_path):
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


def test_what_h5py_packs_and_how_anndata_stores_counts_are_read(tmp_path):
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
    """Zeros packed by gzip, without the time that packing so many takes; the check sum at the end is missing."""
    pack = zlib.compressobj(9)
    head, part = pack.flush(zlib.Z_FULL_FLUSH), 2**24
    return head + (pack.compress(bytes(part)) + pack.flush(zlib.Z_FULL_FLUSH)) * (n_bytes // part)


def put_bomb(file, name, shape, dtype):
    data = replace(file, name, shape=shape, dtype=dtype, chunks=shape, compression="gzip")
    data.id.write_direct_chunk((0,) * len(shape), bomb(2**32))


def put_short(file, name, shape, **packing):
    """Store chunks that unpack to 8 bytes, which HDF5 would take for all of their values."""
    data = replace(file, name, shape=shape, dtype="u1", chunks=shape, **packing)
    raw = b"\5" * 8
    lzf = bytes([7]) + raw  # a run of 8 letters
    packed = zlib.compress(raw) if packing.get("compression") == "gzip" else lzf if packing.get("compression") else raw
    data.id.write_direct_chunk((0,) * len(shape), packed)


def add_column(file, **made):
    replace(file, "obs/array_row", **made)


def unknown_filter(file, name, shape):
    attrs = dict(file[name].attrs)
    del file[name]
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk(shape)
    made.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)  # zstd, for which HDF5 would look for a library
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.NATIVE_UINT8, space, dcpl=made).write_direct_chunk(
        (0,) * len(shape), b"x" * 9
    )
    file[name].attrs.update(attrs)


def one_text_many_times(path):
    """Let each of 60,000 entries of a column name one text of a megabyte, as HDF5 allows."""
    n, long = 60_000, "x" * 2**20
    with h5py.File(path, "a") as file:
        replace(file, "obs/_index", data=[long] + ["y"] * (n - 1), dtype=h5py.string_dtype())
        start = file["obs/_index"].id.get_offset()
    raw = bytearray(path.read_bytes())
    raw[start : start + 16 * n] = raw[start : start + 16] * n
    path.write_bytes(raw)


HUGE = {
    "picture": (H5AD, lambda f: replace(f, IMAGE, shape=(60_000, 60_000, 3), dtype="u1", chunks=(64, 64, 3)), "60,000"),
    "picture of one row": (H5AD, lambda f: replace(f, IMAGE, shape=(1, 10**10, 3), dtype="u1"), "is a picture of"),
    "small picture of a huge type": (H5AD, lambda f: replace(f, IMAGE, shape=(9, 9), dtype="S99999999"), "It must be"),
    "a hundred pictures": (
        H5AD,
        lambda f: [f.create_dataset(f"uns/spatial/L{i}/images/hires", (7000, 7000, 3), "u1") for i in range(100)],
        "at most",
    ),
    "column": (H5AD, lambda f: add_column(f, shape=(10**9,), dtype="f8"), "row' is declared as 1,000,000,000"),
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
        lambda f: add_column(f, shape=(4,), maxshape=(None,), dtype="u1", chunks=(2**32 - 1,), compression="gzip"),
        "obs/array_row",
    ),
    "gzip column": (H5AD, lambda f: put_bomb(f, "obs/array_row", (4,), "u1"), "unpacks to another size than"),
    "gzip picture": (H5AD, lambda f: put_bomb(f, IMAGE, (4, 4, 3), "u1"), "unpacks to another size than"),
    "gzip tiles": (PATCHES, lambda f: put_bomb(f, "img", (4, 224, 224, 3), "u1"), "unpacks to another size than"),
    "barcodes": (PATCHES, lambda f: huge_patches(f), "is declared as 1,000,000,000"),
    "many barcodes": (PATCHES, lambda f: replace(f, "barcode", shape=(10**10,), dtype="S8"), "codes for 4"),
    "chunk of tiles": (
        PATCHES,
        lambda f: replace(f, "img", shape=(4, 224, 224, 3), maxshape=(None, 224, 224, 3), dtype="u1",
                          chunks=(20_000, 224, 224, 3)),
        "the chunks of '/img'",
    ),
    "filter of tiles": (PATCHES, lambda f: unknown_filter(f, "img", (4, 224, 224, 3)), "other filters than are read"),
    "filter of a column": (H5AD, lambda f: unknown_filter(f, "obs/array_row", (4,)), "other filters than are read"),
    "deep": (H5AD, lambda f: f.create_group("uns/other2/" + "a/" * 3000), "nested more than 64 deep"),
    "a column elsewhere": (H5AD, lambda f: f["obs"].attrs.create("column-order", ["/uns/other"]), "'/uns/other'"),
    "column of records": (H5AD, lambda f: add_column(f, data=np.zeros(4, [("a", "i4")])), "neither numbers nor text"),
    "column of bytes": (H5AD, lambda f: add_column(f, data=np.zeros(4, "V8")), "neither numbers nor text"),
    "column of one value": (H5AD, lambda f: add_column(f, data=1.0), "has no value for each row"),
    "column without values": (H5AD, lambda f: add_column(f, data=h5py.Empty("i4")), "has no value for each row"),
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
        "unpacks to another size than",
    ),
    **{
        f"short {place.rpartition('/')[2]}, {words}": (
            name,
            lambda f, place=place, shape=shape, packing=packing: put_short(f, place, shape, **packing),
            "unpacks to another size than",
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
    "column of vectors": (H5AD, lambda f: add_column(f, shape=(4,), dtype=h5py.vlen_dtype("f8")), "neither"),
}  # fmt: skip


def replace_dense(file, shape):
    del file["X"]
    file.create_dataset("X", shape, "u1", chunks=(1, 10**6), compression="gzip")
    file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def huge_patches(file):
    replace(file, "img", shape=(10**9, 224, 224, 3), dtype="u1", chunks=(1, 224, 224, 3))
    replace(file, "barcode", shape=(10**9,), dtype="S8", chunks=(10**4,))


def test_declared_sizes_out_of_proportion_are_refused(check_refused, tmp_path):
    jobs, whole = {}, full_slide(tmp_path / "whole")
    for i, (what, (name, change, words)) in enumerate(HUGE.items()):
        root = shutil.copytree(whole, tmp_path / str(i))
        with h5py.File(root / name, "a") as file:
            change(file)
        jobs[what] = "slide", root, root / name, words
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


def test_groups_that_are_linked_many_times_are_not_read_as_often(check_refused, tmp_path):
    path = full_slide(tmp_path) / H5AD
    with h5py.File(path, "a") as file:
        group = file.create_group("uns/peka_lite")
        for _ in range(40):  # 2**40 ways to the last
            group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
            below = group.create_group("a")
            group["b"] = below
            group = below
    check_refused({"draw": ("draw", path, path, "has too many parts, or links to itself")})


# --- malformed sparse counts ---------------------------------------------------------------------------------------


def change_matrix(file, at, field, how):
    """Spoil one field of a sparse matrix of 4 or more rows."""
    group = file[at]
    values = group[field][()]
    spoilt = {
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
    group[field] = spoilt


BROKEN = [
    *[("indptr", how) for how in ("-5", "2**30", "falls", "first", "last", "short", "long", "fractions", "none")],
    *[("indices", how) for how in ("beyond", "far beyond", "unsigned", "one beyond", "negative", "fractions", "short")],
    *[("data", how) for how in ("short", "text", "table", "none")],
]


def test_malformed_sparse_counts_are_refused_before_rows_are_taken(check_refused, tmp_path):
    jobs = {}
    X = sparse.csr_matrix(np.arange(24, dtype=np.float32).reshape(4, 6))
    for kind, matrix in {"csr": X, "csc": X.tocsc()}.items():
        whole = write_slide(tmp_path / kind, X=matrix)
        for field, how in BROKEN:
            root = shutil.copytree(whole, tmp_path / f"{kind}_{field}_{how}")
            with h5py.File(root / H5AD, "a") as file:
                change_matrix(file, "X", field, how)
            jobs[kind, field, how] = "slide", root, root / H5AD, "/X is no sparse matrix: "
            jobs["counts", kind, field, how] = "counts", root / H5AD, root / H5AD, "/X is no sparse matrix: "
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
        jobs[field, how] = "add", path, "counts of S1", "is no sparse matrix"
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
    """Put the folder of text files in the place of the HDF5 file."""
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


def test_malformed_folders_of_text_are_refused(check_refused, tmp_path):
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


# --- what outputs keep ---------------------------------------------------------------------------------------------


def test_predictions_keep_places_and_pictures_alone(tmp_path):
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
def test_scale_factors_are_numbers_above_0(tmp_path, value):
    root = full_slide(tmp_path)
    with h5py.File(root / H5AD, "a") as file:
        del file["uns/spatial/ST/scalefactors/spot_diameter_fullres"]
        file["uns/spatial/ST/scalefactors/spot_diameter_fullres"] = value
    with pytest.raises(ValueError, match=r"S1\.h5ad: '/uns/spatial/ST/scalefactors/spot_diameter_fullres' is no num"):
        read_slide(root, "S1")


def test_added_slides_keep_places_and_names_of_genes_alone(tmp_path):
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
