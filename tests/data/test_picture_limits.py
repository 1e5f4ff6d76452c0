"""Small files that declare huge images, endless structures or other files raise an error before decoding."""

import io
import os
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from peka_lite.data import SlideError, open_slide

PINK = (200, 120, 180)
HE = np.full((512, 512, 3), PINK, np.uint8)
MEMORY = 4 * 2**30  # of address space, in a child process
CHILD = """
import sys
from peka_lite.data import open_slide
for path in sys.argv[1:]:
    try:
        with open_slide(path, mpp=0.5) as slide:
            slide.read_tile(0, 0)
        print(path, "was read")
    except ValueError as error:
        print(error)
"""


def open_in_child(*paths):
    """Open each slide and read a tile in a process with limited memory and time; return a line of output per slide."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # noqa: E731
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], preexec_fn=limit, capture_output=True, timeout=60,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(path) for path in paths]
    return lines


def encode(kind, **options):
    """Return the bytes of a small image file."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), PINK).save(file, kind, **options)
    return bytearray(file.getvalue())


def set_size(data, offset, form, width=65_500, height=65_500):
    struct.pack_into(form, data, offset, width, height)
    return data


def png(width, height):
    """Return a valid PNG of one color, a thousand times smaller than its pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * (1 + 3 * width) * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff(width, height, *, tile=None, n=1, data=b"\xc8" * 100, tags=(), next_page=0):
    """Return a TIFF of one page whose `n` tiles, or one strip, share their bytes."""
    tags = [*tags, (256, 4, 1, width), (257, 4, 1, height), (259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, 3)]
    offsets, sizes = (324, 325) if tile else (273, 279)
    tags += [(322, 4, 1, tile), (323, 4, 1, tile)] if tile else [(278, 4, 1, height)]
    end = 8 + 2 + 12 * (len(tags) + 3) + 4
    table = end + 6 + len(data)
    tags += [
        (258, 3, 3, end),
        (offsets, 4, n, table if n > 1 else end + 6),
        (sizes, 4, n, table + 4 * n if n > 1 else len(data)),
    ]
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    page += struct.pack("<I", next_page) + struct.pack("<HHH", 8, 8, 8) + data
    if n > 1:
        page += struct.pack("<I", end + 6) * n + struct.pack("<I", len(data)) * n
    return b"II*\0" + struct.pack("<I", 8) + page


JP2 = encode("JPEG2000")
HUGE = {
    "a.png": png(50_000, 50_000),
    "a.jpg": (lambda d: set_size(d, d.index(b"\xff\xc0") + 5, ">HH"))(encode("JPEG")),
    "progressive.jpg": (lambda d: set_size(d, d.index(b"\xff\xc2") + 5, ">HH"))(encode("JPEG", progressive=True)),
    "a.jp2": set_size(set_size(JP2, JP2.index(b"ihdr") + 4, ">II"), JP2.index(b"\xff\x51") + 6, ">II"),
    "a.bmp": set_size(encode("BMP"), 18, "<ii"),
    "a.gif": set_size(encode("GIF"), 6, "<HH"),
    "a.ppm": b"P6 65500 65500 255\n" + b"aaa" * 100,
    "strip.tif": tiff(60_000, 60_000),
    "tile.tif": tiff(60_000, 60_000, tile=60_000),
    "tile-of-2-30.tif": tiff(2**31 - 1, 2**31 - 1, tile=2**30, n=4),
    "large-tile-of-a-small-image.tif": tiff(512, 512, tile=60_000),
    "one-tile-everywhere.tif": tiff(65_536, 65_536, tile=8192, n=64, data=b"\xc8" * 10_000),
}


def test_huge_declared_images_raise_before_decoding(tmp_path):
    for name, data in HUGE.items():
        (tmp_path / name).write_bytes(data)
    for line in open_in_child(*(tmp_path / name for name in HUGE)):
        assert " it declares " in line
        assert ". Copy it again, or convert it" in line
        assert "more than is plausible for a file of" in line


def test_large_image_ignores_pillows_limit(tmp_path, monkeypatch):
    Image.fromarray(HE).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        assert (slide.thumbnail()[0] == PINK).all()
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_progressive_jpeg_of_many_scans_raises(tmp_path):
    data = bytes(encode("JPEG", progressive=True))
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    (tmp_path / "a.jpg").write_bytes(data)
    with open_slide(tmp_path / "a.jpg", mpp=0.5) as slide:
        assert slide.size == (64, 64)
    (tmp_path / "a.jpg").write_bytes(data[:end] + data[start:end] * 100_000 + data[end:])
    with pytest.raises(SlideError, match=r"a\.jpg: it is a progressive JPEG of 100,\d\d\d scans"):
        open_slide(tmp_path / "a.jpg", mpp=0.5)


def test_image_larger_than_memory_raises(tmp_path, monkeypatch):
    import psutil

    Image.new("RGB", (900, 900), PINK).save(tmp_path / "a.png")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    with pytest.raises(SlideError, match=r"a.png: decoding it takes 0.0 GB.*Save it as a tiled TIFF"):
        open_slide(tmp_path / "a.png", mpp=0.5)


def pages(n, *, back_to=None):
    """Return a TIFF of `n` pages without pixels; the last links to page `back_to`."""
    one = 2 + 2 * 12 + 4
    file = bytearray(b"II*\0" + struct.pack("<I", 8))
    for i in range(n):
        next_page = 8 + one * (i + 1) if i < n - 1 else 0 if back_to is None else 8 + one * back_to
        file += struct.pack("<HHHIIHHIII", 2, 256, 4, 1, 64, 257, 4, 1, 64, next_page)
    return bytes(file)


ENDLESS = (
    (pages(150, back_to=0), "its pages form a cycle"),
    (pages(300, back_to=200), "its pages form a cycle"),
    (pages(1, back_to=0), "its pages form a cycle"),
    (pages(100_000), "more than 10,000 pages"),
    (tiff(512, 512, tile=256, n=4, tags=[(33_333, 5, 2**31, 8)]), "its tags are larger than the file"),
    (tiff(512, 512, tags=[(270, 2, 2**25, 8)]), "its tag"),
    (
        tiff(256, 256, tile=256).replace(
            struct.pack("<HHII", 325, 4, 1, 100), struct.pack("<HHII", 325, 4, 1, 2**32 - 1)
        ),
        "it declares a tile or strip larger than the file",
    ),
)


def test_endless_tags_raise_before_decoding(tmp_path):
    for i, (data, _) in enumerate(ENDLESS):
        (tmp_path / f"{i}.tif").write_bytes(data)
    lines = open_in_child(*(tmp_path / f"{i}.tif" for i in range(len(ENDLESS))))
    for line, (_, message) in zip(lines, ENDLESS, strict=True):
        assert message in line


def test_shared_subifd_is_not_a_cycle(tmp_path):
    shared = tiff(512, 512, tile=256, n=4, data=HE[:256, :256].tobytes(), tags=[(330, 4, 1, 8)])  # a SubIFD of itself
    (tmp_path / "a.tif").write_bytes(shared)
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        assert (slide.thumbnail()[0] == PINK).all()


OME = (
    '{dtd}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:a"><Image ID="Image:0">'
    '<Pixels DimensionOrder="XYCZT" ID="Pixels:0" SizeX="512" SizeY="512" SizeC="3" SizeZ="{z}" SizeT="1" Type="uint8">'
    '<Channel ID="C:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="{planes}">{file}</TiffData></Pixels></Image>'
    "{more}</OME>"
)
ENTITIES = '<!DOCTYPE x [<!ENTITY a "aaaa">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 9}">' for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
) + "]>"  # fmt: skip
MODULO = (
    '<StructuredAnnotations><XMLAnnotation ID="A" Namespace="openmicroscopy.org/omero/dimension/modulo"><Value>'
    '<Modulo><ModuloAlongZ Type="lifetime" Start="0" End="9e9" Step="1"/></Modulo></Value></XMLAnnotation>'
    "</StructuredAnnotations>"
)


def write_ome(path, pixels=HE, **changes):
    parts = {"dtd": "", "z": 1, "planes": 1, "file": "", "more": ""} | changes
    xml = OME.format(**parts)
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), description=xml, metadata=None)
    return path


def test_oversized_ome_xml_raises(tmp_path):
    many = "declares more planes than a TIFF can have"
    cases = (
        ({"z": 2 * 10**9}, many),
        ({"planes": 2 * 10**9}, many),
        ({"more": MODULO}, many),
        ({"dtd": ENTITIES, "more": "<a>&k;</a>"}, "XML that declares entities"),
    )
    lines = open_in_child(*(write_ome(tmp_path / f"{i}.ome.tif", **case) for i, (case, _) in enumerate(cases)))
    for line, (_, message) in zip(lines, cases, strict=True):
        assert message in line


def test_file_named_in_ome_xml_is_not_opened(tmp_path):
    (tmp_path / "user").mkdir()
    other = HE.astype(np.uint16)
    other[:] = 10
    tifffile.imwrite(tmp_path / "user/private.tif", other, photometric="rgb", tile=(256, 256))
    (tmp_path / "received").mkdir()
    named = '<UUID FileName="../user/private.tif">urn:uuid:b</UUID>'
    deep = HE.astype(np.uint16) * 257  # 16 bits: read by tifffile
    write_ome(tmp_path / "received/a.ome.tif", deep, file=named)
    with open_slide(tmp_path / "received/a.ome.tif", mpp=0.5) as slide:
        assert (slide.thumbnail()[0] == PINK).all()


VMS = (
    "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile={image}\nMapFile={map}\n"
    "OptimisationFile=\nSourceLens=20\nPhysicalWidth=1\nPhysicalHeight=1\nMacroImage=a.jpg\n"
)


SEVERAL = (
    ("a.vms", {"a.vms": VMS.format(image="../private.jpg", map="a.jpg")}, "'../private.jpg' in another folder"),
    ("a.svs", {"a.svs": VMS.format(image="a.jpg", map="/etc/passwd")}, "'/etc/passwd' in another folder"),
    ("a.vms", {"a.vms": VMS.format(image="pipe", map="a.jpg")}, "pipe in its folder is not a regular file"),
    ("a.mrxs", {"a.mrxs": "", "a/Slidedat.ini": "[HIERARCHICAL]\nINDEXFILE = ../x\n"}, "'../x' in another folder"),
    ("a.mrxs", {"a.mrxs": "", "a/Slidedat.ini": "[DATAFILE]\nFILE_0=../x\n"}, "'../x' in another folder"),
    ("a.mrxs", {"a.mrxs": "", "a/Slidedat.ini": "DIGITIZER_WIDTH = 90000\n"}, "30.2 GB of pixels at once"),
    ("a.dcm", {"a.dcm": "\0" * 128 + "DICM"}, "pipe in its folder is not a regular file"),
)


def test_slide_index_must_not_list_other_folders_or_pipes(tmp_path):
    slides = []
    for i, (name, files, _) in enumerate(SEVERAL):
        (tmp_path / f"{i}").mkdir()
        os.mkfifo(tmp_path / f"{i}/pipe")
        Image.fromarray(HE).save(tmp_path / f"{i}/a.jpg")
        for part, text in files.items():
            (tmp_path / f"{i}" / part).parent.mkdir(exist_ok=True)
            (tmp_path / f"{i}" / part).write_text(text)
        slides.append(tmp_path / f"{i}" / name)
    for line, (*_, message) in zip(open_in_child(*slides), SEVERAL, strict=True):
        assert message in line


@pytest.mark.parametrize("codec", ["jpeg", "jpeg2000"])
def test_strip_with_a_larger_image_raises(tmp_path, codec):
    """Decoders use the size in the strip's header, which can differ from the page's."""
    path = tmp_path / "a.tif"
    deep = {"jpeg": HE, "jpeg2000": HE.astype(np.uint16) * 257}[codec]
    tifffile.imwrite(path, deep, photometric="rgb", compression=codec, metadata=None, rowsperstrip=512)
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[0]
    data = bytearray(path.read_bytes())
    marker, form, ahead = {"jpeg": (b"\xff\xc0", ">HH", 5), "jpeg2000": (b"\xff\x51", ">II", 6)}[codec]
    path.write_bytes(set_size(data, data.index(marker, start) + ahead, form))
    assert "it holds 65500 x 65500 px in a tile of 512 x 512" in open_in_child(path)[0]


def test_postscript_is_not_opened(tmp_path, monkeypatch):
    """Pillow would run Ghostscript."""
    from PIL import EpsImagePlugin

    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: called.append(1))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nquit\n")
    with pytest.raises(SlideError, match=r"a.png: OpenSlide cannot read it"):
        open_slide(tmp_path / "a.png", mpp=0.5)
    assert not called


def test_tag_with_several_values_raises(tmp_path):
    path = tmp_path / "a.tif"
    deep = HE.astype(np.uint16) * 257
    tifffile.imwrite(path, deep, photometric="rgb", compression="jpeg2000", rowsperstrip=512, metadata=None)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].tags["PhotometricInterpretation"].offset
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, offset + 4, 2)
    path.write_bytes(data)
    with pytest.raises(SlideError, match=r"a\.tif: "):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize("kind", [3, 2, 12])
def test_resolution_tag_of_another_type_is_ignored(tmp_path, kind):
    """Tags 282 and 283 should be fractions."""
    path = tmp_path / "a.tif"
    deep = HE.astype(np.uint16) * 257
    tifffile.imwrite(path, deep, photometric="rgb", resolution=(20_000, 20_000), resolutionunit=3, metadata=None)
    data = bytearray(path.read_bytes())
    for tag in (282, 283):
        struct.pack_into("<H", data, data.index(struct.pack("<HHI", tag, 5, 1)) + 2, kind)
    path.write_bytes(data)
    with pytest.raises(SlideError, match="the file has no resolution metadata"):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.thumbnail()[0] == PINK).all()
