"""Gene names: a model's gene order, the mapping of other names to it, and data with unknown names."""

import gzip
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import sparse

from peka_lite.teachers import ScFoundation
from peka_lite.teachers._vocabulary import align_to_vocabulary, read_gene_mapping, read_vocabulary, rename

# NKX2 is not a real symbol, but a numbered copy of it would have the name of the gene NKX2-1.
GENES = pd.Index(["TP53", "NKX2-1", "NKX2", "TBCE", "FAM21A", "ERBB2", "ACTB", "ESR1"])

pytestmark = pytest.mark.filterwarnings("ignore:Variable names are not unique")


def make_adata(counts, genes=GENES):
    counts = sparse.csr_matrix(np.asarray(counts, dtype=np.float64))
    obs = pd.DataFrame(index=[f"spot{i}" for i in range(counts.shape[0])])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(genes)))


def random_counts(n_spots, n_genes, seed=0):
    return np.random.default_rng(seed).poisson(2.0, (n_spots, n_genes)) + 1


def logged(counts):
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)


# --- gene lists ----------------------------------------------------------------------------------------------------


def test_table_is_sorted_by_its_index(tmp_path):
    (tmp_path / "genes.tsv").write_text("gene_name\tindex\nTBCE\t2\nTP53\t0\nNKX2-1\t1\n")
    assert read_vocabulary(tmp_path / "genes.tsv").tolist() == ["TP53", "NKX2-1", "TBCE"]


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_json_list_keeps_its_order(tmp_path, kind):
    (tmp_path / "genes.json").write_text('["TBCE", "TP53"]')
    assert read_vocabulary(kind(tmp_path / "genes.json")).tolist() == ["TBCE", "TP53"]


@pytest.mark.parametrize("kind", [list, tuple, pd.Index, np.array])
def test_sequence_of_names_is_a_gene_list(kind):
    assert read_vocabulary(kind(["TBCE", "TP53"])).tolist() == ["TBCE", "TP53"]


def test_na_is_a_gene_name(tmp_path):
    (tmp_path / "genes.tsv").write_text("gene_name\tindex\nNA\t0\nnan\t1\n")
    assert read_vocabulary(tmp_path / "genes.tsv").tolist() == ["NA", "nan"]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("genes.tsv", "", "not a gene list"),
        pytest.param("genes.tsv", "gene_name\tindex" + "\tx" * 10**6, "its first line has more than", id="wide"),
        ("genes.tsv", "gene\tindex\nA\t0\n", "not a gene list.*gene_name and index"),
        ("genes.tsv", "gene_name\tplace\nA\t0\n", "not a gene list.*gene_name and index"),
        ("genes.tsv", "gene_name\tindex\nA\t1\nB\t2\n", "index must count from 0"),
        ("genes.tsv", "gene_name\tindex\nA\t0\nB\t2\n", "index must count from 0"),
        ("genes.tsv", "gene_name\tindex\nA\t0\nA\t1\n", "'A' occurs more than once"),
        ("genes.json", '["A", ', "not a gene list"),
        ("genes.json", "[]", "at least one"),
        ("genes.json", '["A", 5]', "names only"),
        ("genes.json", '["A", ""]', "names only"),
        ("genes.json", '["A", "B", "A"]', "'A' occurs more than once"),
        ("genes.json", "5", "gene list"),
        ("genes.json", "[" * 100_000, "not a gene list.*nested too deeply"),
        ("genes.json", "1" * 5000, "not a gene list.*4300 digits"),
        ("genes.tsv", "gene_name\tindex\nA\t0\nB\tone\n", "not a gene list"),
        ("genes.tsv", "gene_name\tindex\nA\tinf\nB\t\n", "not a gene list.*index must count"),
        ("genes.tsv.gz", "gene_name\tindex\nA\t0\n", "not a gene list"),  # not compressed
        ("genes.json", '"TP53"', "gene list"),
        ("genes.json", '{"TP53": 1, "TBCE": 0}', "gene list"),
    ],
)
def test_invalid_gene_list_is_rejected_by_name(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        read_vocabulary(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_compressed_gene_list_is_read_up_to_a_limit(tmp_path):
    path = tmp_path / "genes.tsv.gz"
    path.write_bytes(gzip.compress(b"gene_name\tindex\nTP53\t1\nNA\t0\n"))
    assert read_vocabulary(path).tolist() == ["NA", "TP53"]
    path.write_bytes(gzip.compress(b"gene_name\tindex\n" + b"A\t0\n" * 2**23))
    with pytest.raises(ValueError, match=r"genes\.tsv\.gz: not a gene list \(unpacks to more than is read"):
        read_vocabulary(path)


def test_oversized_files_are_rejected_unread(tmp_path):
    for name, read in {"a.json": read_vocabulary, "a.tsv": read_vocabulary, "hgnc.txt": read_mapping}.items():
        with (tmp_path / name).open("wb") as file:
            file.write(b"symbol\n")
            file.truncate(2**40)
        with pytest.raises(ValueError, match=rf"{name}: .*1,099,511,627,776 bytes, more than are read"):
            read(tmp_path / name)


def read_mapping(path):
    return read_gene_mapping(path, GENES)


@pytest.mark.parametrize(
    ("row", "why"), [("A" * 200_000, "line 10 cannot be parsed"), ("\n".join("ABC"), None), ("\xff", "not UTF-8 text")]
)
def test_mapping_with_unusual_lines_is_read_or_rejected_with_a_reason(hgnc, row, why):
    with hgnc.open("a", encoding="latin-1") as file:
        file.write(row)
    if why:
        with pytest.raises(ValueError, match=rf"hgnc\.txt: .*{why}"):
            read_gene_mapping(hgnc, GENES)
    else:
        assert read_gene_mapping(hgnc, GENES)["NGL"] == "ERBB2"


def test_missing_gene_list_error_names_the_fetch_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tsv: gene list not found.*peka-lite fetch scfoundation-genes"):
        read_vocabulary(tmp_path / "none.tsv")


# --- other names ---------------------------------------------------------------------------------------------------

HGNC = [
    # symbol, prev_symbol, alias_symbol, ensembl_gene_id
    ("TP53", "", "P53|LFS1|TAKEN", "ENSG00000141510"),
    ("ERBB2", "NGL", "HER2|NEU|SHARED", "ENSG00000141736"),
    ("ESR1", "ESR", "NR3A1|SHARED|HER2B", "ENSG00000091831"),
    ("WASHC2A", "FAM21A|FAM21B", "BA56A21.1", "ENSG00000099290"),  # the vocabulary has its former symbol
    ("ACTB", "BOTH", "UNHEARD|GONE", "ENSG00000075624"),
    ("TBCE", "", "BOTH|P53", ""),
    ("UNHEARD", "OLDUNHEARD", "ERBB2", "ENSG00000000001"),  # its alias is another gene's symbol
    ("NOWHERE", "GONE", "UNUSED|TAKEN", "ENSG00000000002"),
]


def write_hgnc(path, rows):
    """Write a table in HGNC's layout: extra columns, and lists of names in quotes."""
    lines = ["hgnc_id\tsymbol\tname\talias_symbol\tprev_symbol\tensembl_gene_id"]
    for i, (symbol, prev, alias, ensembl) in enumerate(rows):
        prev, alias = (f'"{names}"' if "|" in names else names for names in (prev, alias))
        lines.append(f"HGNC:{i}\t{symbol}\tsome gene\t{alias}\t{prev}\t{ensembl}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def hgnc(tmp_path):
    return write_hgnc(tmp_path / "hgnc.txt", HGNC)


@pytest.mark.parametrize(
    ("name", "gene"),
    [
        ("ENSG00000141510", "TP53"),
        ("ENSG00000141510.18", "TP53"),
        ("LFS1", "TP53"),
        ("NGL", "ERBB2"),
        ("HER2", "ERBB2"),
        ("ESR", "ESR1"),
        ("WASHC2A", "FAM21A"),
        ("FAM21B", "FAM21A"),
        ("ENSG00000099290.3", "FAM21A"),
        ("BA56A21.1", "FAM21A"),
        ("FAM21A", "FAM21A"),
        ("BOTH", "ACTB"),  # a former symbol has priority over an alias
        ("SHARED", "SHARED"),  # an alias of two genes
        ("P53", "P53"),  # an alias of two genes
        ("ERBB2", "ERBB2"),  # a symbol is kept even if it is an alias of another gene
        ("UNUSED", "UNUSED"),
        ("UNHEARD", "UNHEARD"),  # symbol of a gene outside the vocabulary, alias of one inside
        ("GONE", "GONE"),  # a former symbol of one gene, an alias of another
        ("TAKEN", "TAKEN"),  # an alias of two genes, one outside the vocabulary
        ("ENSG00000000002", "ENSG00000000002"),
        ("ENSG99999999999.1", "ENSG99999999999.1"),
    ],
)
def test_unambiguous_names_map_to_the_vocabulary(hgnc, name, gene):
    assert rename([name], GENES, read_gene_mapping(hgnc, GENES)).tolist() == [gene]


def test_gene_outside_the_vocabulary_is_not_mapped_by_its_alias(hgnc):
    # UNHEARD has the alias ERBB2, which is another gene's symbol
    assert not {"UNHEARD", "OLDUNHEARD", "ENSG00000000001"} & set(read_gene_mapping(hgnc, GENES))


def test_symbol_has_priority_over_other_names_of_its_gene(tmp_path):
    path = write_hgnc(tmp_path / "hgnc.txt", [("ESR1", "TBCE|ESR", "ACTB", "ENSG1"), ("NEW", "TP53", "ERBB2", "ENSG2")])
    mapping = read_gene_mapping(path, GENES)
    assert mapping == {"ESR": "ESR1", "ENSG1": "ESR1", "NEW": "TP53", "ENSG2": "TP53"}


def test_first_of_several_former_symbols_in_the_vocabulary_is_used(tmp_path):
    # the order of a set would differ between processes
    rows = [(f"NEW{i}", f"A{i}|B{i}|C{i}|D{i}", "", f"ENSG{i}") for i in range(20)]
    vocabulary = [f"{letter}{i}" for letter in "DBCA" for i in range(20)]
    mapping = read_gene_mapping(write_hgnc(tmp_path / "hgnc.txt", rows), vocabulary)
    assert [mapping[f"ENSG{i}"] for i in range(20)] == [f"A{i}" for i in range(20)]


def test_symbol_that_two_genes_formerly_had_is_assigned_to_neither(tmp_path):
    path = write_hgnc(tmp_path / "hgnc.txt", [("NEW1", "TBCE", "", "ENSG1"), ("NEW2", "TBCE|ACTB", "", "ENSG2")])
    assert read_gene_mapping(path, GENES) == {"NEW2": "ACTB", "ENSG2": "ACTB"}


def test_mapping_targets_are_symbols_of_the_vocabulary(hgnc):
    mapping = read_gene_mapping(hgnc, GENES)
    assert set(mapping.values()) <= set(GENES)
    assert not set(mapping) & set(GENES)


def test_data_with_ensembl_ids_equal_data_with_symbols(hgnc):
    counts = random_counts(5, 4)
    ids = ["ENSG00000141510.18", "ENSG00000099290.3", "ENSG00000075624", "ENSG00000091831.1"]
    X, coverage = align_to_vocabulary(make_adata(counts, ids), GENES, mapping=read_gene_mapping(hgnc, GENES))
    plain, _ = align_to_vocabulary(make_adata(counts, ["TP53", "FAM21A", "ACTB", "ESR1"]), GENES)
    assert coverage == 1
    np.testing.assert_array_equal(X.toarray(), plain.toarray())


def test_two_ids_of_one_gene_are_summed(hgnc):
    names = ["ENSG00000141510.1", "ENSG00000141510.2", "TP53", "ACTB"]
    X, _ = align_to_vocabulary(make_adata([[1, 2, 4, 8]], names), GENES, mapping=read_gene_mapping(hgnc, GENES))
    assert X.toarray()[0, [0, 6]].tolist() == [7, 8]


def test_teacher_accepts_a_mapping_as_file_or_dict(hgnc):
    by_file, by_dict = (
        ScFoundation(
            ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2).encoder, GENES, mapping=m, origin="test"
        )
        for m in (hgnc, read_gene_mapping(hgnc, GENES))
    )
    adata = make_adata(random_counts(3, 4), ["WASHC2A", "NGL", "ESR", "ENSG00000075624"])
    tokens = by_file.tokens(adata)
    assert tokens.positions[:4].tolist() == [4, 5, 6, 7]
    assert by_file.fingerprint == by_dict.fingerprint


@pytest.mark.parametrize("column", ["symbol", "prev_symbol", "alias_symbol", "ensembl_gene_id"])
def test_table_without_hgncs_columns_is_rejected_by_name(hgnc, column):
    hgnc.write_text(hgnc.read_text().replace(f"\t{column}", "\tother", 1))
    with pytest.raises(ValueError, match=rf"hgnc\.txt: columns {column} are missing"):
        read_gene_mapping(hgnc, GENES)


def test_missing_mapping_error_names_the_fetch_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: gene mapping not found.*peka-lite fetch hgnc"):
        read_gene_mapping(tmp_path / "none.txt", GENES)


def test_numbered_copies_are_renamed_and_real_symbols_are_kept():
    names = pd.Index(["TBCE", "TBCE", "TBCE", "NKX2-1", "NKX2-1", "NKX2", "OTHER", "OTHER"])
    unique = ad.AnnData(np.zeros((1, 8)), var=pd.DataFrame(index=names))
    unique.var_names_make_unique()
    assert unique.var_names.tolist()[1:5] == ["TBCE-1", "TBCE-2", "NKX2-1", "NKX2-1-1"]
    assert rename(unique.var_names, GENES).tolist() == [
        "TBCE", "TBCE", "TBCE", "NKX2-1", "NKX2-1", "NKX2", "OTHER", "OTHER-1"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["TBCE-1", "TBCE-AS1", "TBCE-", "-1"])
def test_numbered_name_without_its_gene_is_kept(name):
    assert rename([name, "ACTB"], GENES).tolist() == [name, "ACTB"]


# --- alignment -----------------------------------------------------------------------------------------------------


@given(order=st.permutations(range(len(GENES) + 3)), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_column_order_and_unexpressed_unknown_genes_do_not_matter(order, seed):
    counts = random_counts(4, len(GENES), seed)
    wide = np.hstack([counts, np.zeros((4, 3), dtype=int)])[:, order]
    names = np.array([*GENES, "UNKNOWN", "TBCE-7", "ENSG9"])[order]
    X, coverage = align_to_vocabulary(make_adata(wide, names), GENES)
    np.testing.assert_array_equal(X.toarray(), counts)
    assert (X.shape, X.dtype, coverage) == ((4, len(GENES)), np.float32, 1)


def test_unmeasured_genes_are_zero():
    X, _ = align_to_vocabulary(make_adata([[3, 4]], ["ESR1", "TP53"]), GENES)
    assert X.toarray().tolist() == [[4, 0, 0, 0, 0, 0, 0, 3]]


@pytest.mark.parametrize("copies", [["ERBB2", "TBCE", "TBCE"], ["ERBB2", "TBCE", "TBCE-1"]])
def test_counts_of_columns_of_the_same_gene_are_summed(copies):
    X, _ = align_to_vocabulary(make_adata([[1, 2, 5]], copies), GENES)
    assert X.toarray()[0, [3, 5]].tolist() == [7, 1]


@given(seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_log_normalized_columns_of_the_same_gene_are_summed_as_counts(seed):
    counts = random_counts(4, 5, seed)
    names = ["TBCE", "ACTB", "TBCE", "TP53", "TBCE-1"]
    summed = np.column_stack([counts[:, [0, 2, 4]].sum(1), counts[:, 1], counts[:, 3]])
    X, _ = align_to_vocabulary(make_adata(logged(counts), names), GENES, logged=True)
    expected, _ = align_to_vocabulary(make_adata(logged(summed), ["TBCE", "ACTB", "TP53"]), GENES, logged=True)
    np.testing.assert_allclose(X.toarray(), expected.toarray(), rtol=1e-6)
    assert X.dtype == np.float32


def test_flag_t_with_copies_equals_tokens_of_summed_counts():
    counts, model = random_counts(4, 4), ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2)
    summed = np.column_stack([counts[:, 0] + counts[:, 2], counts[:, [1, 3]]])
    copies = model.tokens(make_adata(logged(counts), ["TBCE", "ACTB", "TBCE", "TP53"]), pre_normalized="T")
    plain = model.tokens(make_adata(logged(summed), ["TBCE", "ACTB", "TP53"]), pre_normalized="T")
    np.testing.assert_allclose(copies.values, plain.values, rtol=1e-6)


def test_counts_with_copies_are_rejected_as_log_normalized_values():
    model = ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"takes log-normalized values.*whole counts"):
        model.tokens(make_adata(random_counts(4, 4), ["TBCE", "ACTB", "TBCE", "TP53"]), pre_normalized="T")


def test_coverage_is_the_share_of_expressed_genes_in_the_vocabulary():
    model = ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2)
    adata = make_adata([[1, 0, 2, 3, 0], [0, 0, 0, 3, 0]], ["TP53", "ESR1", "TBCE", "UNKNOWN", "ALSO"])
    assert model.coverage(adata) == pytest.approx(2 / 3)
    assert model.coverage(adata[:, :3]) == 1


def test_less_than_half_of_the_genes_is_rejected_with_example_names():
    genes = [f"KNOWN{i}" for i in range(20)]
    known, unknown = genes[5:17], [f"STRANGE{i}" for i in range(13)]
    assert align_to_vocabulary(make_adata(np.ones((2, 24)), known + unknown[:12]), pd.Index(genes))[1] == 0.5
    with pytest.raises(ValueError, match=r"only 48% of the data's expressed genes.*at least half") as error:
        align_to_vocabulary(make_adata(np.ones((2, 25)), known + unknown), pd.Index(genes))
    message = str(error.value)
    assert ", ".join(unknown[:10]) + "." in message
    assert message.endswith(", ".join(genes[:10]))
    assert unknown[10] not in message


def test_unexpressed_genes_do_not_count_for_coverage():
    with pytest.raises(ValueError, match="only 33%"):
        align_to_vocabulary(make_adata([[1, 0, 0, 0, 2, 3]], [*GENES[:4], "A", "B"]), GENES)


def test_ensembl_ids_without_a_mapping_are_named_in_the_error():
    ids = [f"ENSG000001415{i}" for i in range(6)]
    with pytest.raises(ValueError, match=r"named by Ensembl ids.*vocabulary has symbols.*fetch hgnc.*mapping="):
        align_to_vocabulary(make_adata(np.ones((1, 6)), ids), GENES)


def test_ensembl_ids_missing_from_a_mapping_are_named_in_the_error(hgnc):
    ids = [f"ENSMUSG000001415{i}" for i in range(6)]
    with pytest.raises(ValueError, match=r"named by Ensembl ids.*the mapping does not contain these ids"):
        align_to_vocabulary(make_adata(np.ones((1, 6)), ids), GENES, mapping=read_gene_mapping(hgnc, GENES))


def test_single_spot_without_counts_is_named_in_the_error():
    model = ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"express no gene of the vocabulary \(spot0\)"):
        model.tokens(make_adata(np.zeros((1, len(GENES)))))


def test_published_list_is_read_completely(golden):
    path = golden / "scfoundation" / "gene_names.json"
    assert read_vocabulary(path).tolist() == json.loads(path.read_text())
    assert len(read_vocabulary(path)) == 19264
