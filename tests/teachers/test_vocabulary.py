"""Gene names: the order a model knows, other names that lead to it, and data whose names lead nowhere."""

import gzip
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import sparse

from peka_lite.teachers._vocabulary import align_to_vocabulary, read_gene_mapping, read_vocabulary, rename
from peka_lite.teachers.scfoundation import ScFoundation

# NKX2 is no gene's symbol, but a copy of it would be named as the gene NKX2-1 is.
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


def test_a_table_is_put_in_the_order_of_its_index(tmp_path):
    (tmp_path / "genes.tsv").write_text("gene_name\tindex\nTBCE\t2\nTP53\t0\nNKX2-1\t1\n")
    assert read_vocabulary(tmp_path / "genes.tsv").tolist() == ["TP53", "NKX2-1", "TBCE"]


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_json_list_is_taken_as_it_is(tmp_path, kind):
    (tmp_path / "genes.json").write_text('["TBCE", "TP53"]')
    assert read_vocabulary(kind(tmp_path / "genes.json")).tolist() == ["TBCE", "TP53"]


@pytest.mark.parametrize("kind", [list, tuple, pd.Index, np.array])
def test_names_themselves_are_a_gene_list(kind):
    assert read_vocabulary(kind(["TBCE", "TP53"])).tolist() == ["TBCE", "TP53"]


def test_na_is_a_name(tmp_path):
    (tmp_path / "genes.tsv").write_text("gene_name\tindex\nNA\t0\nnan\t1\n")
    assert read_vocabulary(tmp_path / "genes.tsv").tolist() == ["NA", "nan"]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("genes.tsv", "", "no gene list"),
        pytest.param("genes.tsv", "gene_name\tindex" + "\tx" * 10**6, "its first line has more than", id="wide"),
        ("genes.tsv", "gene\tindex\nA\t0\n", "no gene list.*gene_name and index"),
        ("genes.tsv", "gene_name\tplace\nA\t0\n", "no gene list.*gene_name and index"),
        ("genes.tsv", "gene_name\tindex\nA\t1\nB\t2\n", "index must count from 0"),
        ("genes.tsv", "gene_name\tindex\nA\t0\nB\t2\n", "index must count from 0"),
        ("genes.tsv", "gene_name\tindex\nA\t0\nA\t1\n", "'A' stands more than once"),
        ("genes.json", '["A", ', "no gene list"),
        ("genes.json", "[]", "at least one"),
        ("genes.json", '["A", 5]', "holds names"),
        ("genes.json", '["A", ""]', "holds names"),
        ("genes.json", '["A", "B", "A"]', "'A' stands more than once"),
        ("genes.json", "5", "gene list"),
        ("genes.json", "[" * 100_000, "no gene list.*nested too deeply"),
        ("genes.json", "1" * 5000, "no gene list.*4300 digits"),
        ("genes.tsv", "gene_name\tindex\nA\t0\nB\tone\n", "no gene list"),
        ("genes.tsv", "gene_name\tindex\nA\tinf\nB\t\n", "no gene list.*index must count"),
        ("genes.tsv.gz", "gene_name\tindex\nA\t0\n", "no gene list"),  # it is not packed
        ("genes.json", '"TP53"', "gene list"),
        ("genes.json", '{"TP53": 1, "TBCE": 0}', "gene list"),
    ],
)
def test_what_is_no_gene_list_is_refused_by_name(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        read_vocabulary(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_packed_gene_list_is_read_as_far_as_one_goes(tmp_path):
    path = tmp_path / "genes.tsv.gz"
    path.write_bytes(gzip.compress(b"gene_name\tindex\nTP53\t1\nNA\t0\n"))
    assert read_vocabulary(path).tolist() == ["NA", "TP53"]
    path.write_bytes(gzip.compress(b"gene_name\tindex\n" + b"A\t0\n" * 2**23))
    with pytest.raises(ValueError, match=r"genes\.tsv\.gz: no gene list \(unpacks to more than is read"):
        read_vocabulary(path)


def test_a_gene_list_without_end_is_refused_unread(tmp_path):
    for name, read in {"a.json": read_vocabulary, "a.tsv": read_vocabulary, "hgnc.txt": read_mapping}.items():
        with (tmp_path / name).open("wb") as file:
            file.write(b"symbol\n")
            file.truncate(2**40)
        with pytest.raises(ValueError, match=rf"{name}: .*1,099,511,627,776 bytes, more than are read"):
            read(tmp_path / name)


def read_mapping(path):
    return read_gene_mapping(path, GENES)


@pytest.mark.parametrize(
    ("row", "why"),
    [("A" * 200_000, "line 10 is no line of a table"), ("\n".join("ABC"), None), ("\xff", "no text in UTF-8")],
)
def test_a_mapping_with_odd_lines_is_read_or_names_them(hgnc, row, why):
    with hgnc.open("a", encoding="latin-1") as file:
        file.write(row)
    if why:
        with pytest.raises(ValueError, match=rf"hgnc\.txt: .*{why}"):
            read_gene_mapping(hgnc, GENES)
    else:
        assert read_gene_mapping(hgnc, GENES)["NGL"] == "ERBB2"


def test_a_missing_gene_list_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tsv: no such gene list.*peka-lite fetch scfoundation-genes"):
        read_vocabulary(tmp_path / "none.tsv")


# --- other names ---------------------------------------------------------------------------------------------------

HGNC = [
    # symbol, prev_symbol, alias_symbol, ensembl_gene_id
    ("TP53", "", "P53|LFS1|TAKEN", "ENSG00000141510"),
    ("ERBB2", "NGL", "HER2|NEU|SHARED", "ENSG00000141736"),
    ("ESR1", "ESR", "NR3A1|SHARED|HER2B", "ENSG00000091831"),
    ("WASHC2A", "FAM21A|FAM21B", "BA56A21.1", "ENSG00000099290"),  # the vocabulary holds its former symbol
    ("ACTB", "BOTH", "UNHEARD|GONE", "ENSG00000075624"),
    ("TBCE", "", "BOTH|P53", ""),
    ("UNHEARD", "OLDUNHEARD", "ERBB2", "ENSG00000000001"),  # its alias is another gene's symbol
    ("NOWHERE", "GONE", "NOBODY|TAKEN", "ENSG00000000002"),
]


def write_hgnc(path, rows):
    """Write HGNC's layout: more columns than are read, several names of a gene in quotes."""
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
        ("BOTH", "ACTB"),  # a former symbol binds more than an alias
        ("SHARED", "SHARED"),  # an alias of two genes
        ("P53", "P53"),  # an alias of two genes
        ("ERBB2", "ERBB2"),  # a symbol stays what it is, whatever aliases say
        ("NOBODY", "NOBODY"),
        ("UNHEARD", "UNHEARD"),  # the symbol of a gene that the vocabulary lacks, and an alias of one that it has
        ("GONE", "GONE"),  # a former symbol of the one, an alias of the other
        ("TAKEN", "TAKEN"),  # an alias of both
        ("ENSG00000000002", "ENSG00000000002"),
        ("ENSG99999999999.1", "ENSG99999999999.1"),
    ],
)
def test_other_names_lead_to_the_vocabulary_where_they_are_settled(hgnc, name, gene):
    assert rename([name], GENES, read_gene_mapping(hgnc, GENES)).tolist() == [gene]


def test_a_gene_that_the_vocabulary_lacks_does_not_take_anothers_place(hgnc):
    # UNHEARD has the alias ERBB2, which is another gene's symbol
    assert not {"UNHEARD", "OLDUNHEARD", "ENSG00000000001"} & set(read_gene_mapping(hgnc, GENES))


def test_a_symbol_of_the_vocabulary_binds_more_than_other_names_of_its_gene_there(tmp_path):
    path = write_hgnc(tmp_path / "hgnc.txt", [("ESR1", "TBCE|ESR", "ACTB", "ENSG1"), ("NEW", "TP53", "ERBB2", "ENSG2")])
    mapping = read_gene_mapping(path, GENES)
    assert mapping == {"ESR": "ESR1", "ENSG1": "ESR1", "NEW": "TP53", "ENSG2": "TP53"}


def test_of_several_former_symbols_in_the_vocabulary_the_first_is_taken(tmp_path):
    # not whichever a set gives first: that would differ from process to process
    rows = [(f"NEW{i}", f"A{i}|B{i}|C{i}|D{i}", "", f"ENSG{i}") for i in range(20)]
    vocabulary = [f"{letter}{i}" for letter in "DBCA" for i in range(20)]
    mapping = read_gene_mapping(write_hgnc(tmp_path / "hgnc.txt", rows), vocabulary)
    assert [mapping[f"ENSG{i}"] for i in range(20)] == [f"A{i}" for i in range(20)]


def test_a_symbol_of_the_vocabulary_that_two_genes_once_had_is_neithers(tmp_path):
    path = write_hgnc(tmp_path / "hgnc.txt", [("NEW1", "TBCE", "", "ENSG1"), ("NEW2", "TBCE|ACTB", "", "ENSG2")])
    assert read_gene_mapping(path, GENES) == {"NEW2": "ACTB", "ENSG2": "ACTB"}


def test_a_mapping_leads_nowhere_but_to_the_vocabulary(hgnc):
    mapping = read_gene_mapping(hgnc, GENES)
    assert set(mapping.values()) <= set(GENES)
    assert not set(mapping) & set(GENES)


def test_data_named_by_ensembl_ids_are_those_named_by_symbols(hgnc):
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


def test_a_teacher_takes_a_mapping_as_file_or_dict(hgnc):
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
def test_a_table_without_hgncs_columns_is_refused_by_name(hgnc, column):
    hgnc.write_text(hgnc.read_text().replace(f"\t{column}", "\tother", 1))
    with pytest.raises(ValueError, match=rf"hgnc\.txt: columns {column} are missing"):
        read_gene_mapping(hgnc, GENES)


def test_a_missing_mapping_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such gene mapping.*peka-lite fetch hgnc"):
        read_gene_mapping(tmp_path / "none.txt", GENES)


def test_numbered_copies_join_their_gene_and_real_symbols_are_left_alone():
    own = pd.Index(["TBCE", "TBCE", "TBCE", "NKX2-1", "NKX2-1", "NKX2", "OTHER", "OTHER"])
    unique = ad.AnnData(np.zeros((1, 8)), var=pd.DataFrame(index=own))
    unique.var_names_make_unique()
    assert unique.var_names.tolist()[1:5] == ["TBCE-1", "TBCE-2", "NKX2-1", "NKX2-1-1"]
    assert rename(unique.var_names, GENES).tolist() == [
        "TBCE", "TBCE", "TBCE", "NKX2-1", "NKX2-1", "NKX2", "OTHER", "OTHER-1"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["TBCE-1", "TBCE-AS1", "TBCE-", "-1"])
def test_a_name_that_looks_like_a_copy_is_none_without_its_gene(name):
    assert rename([name, "ACTB"], GENES).tolist() == [name, "ACTB"]


# --- alignment -----------------------------------------------------------------------------------------------------


@given(order=st.permutations(range(len(GENES) + 3)), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_order_of_columns_and_unexpressed_unknown_ones_change_nothing(order, seed):
    counts = random_counts(4, len(GENES), seed)
    wide = np.hstack([counts, np.zeros((4, 3), dtype=int)])[:, order]
    names = np.array([*GENES, "UNKNOWN", "TBCE-7", "ENSG9"])[order]
    X, coverage = align_to_vocabulary(make_adata(wide, names), GENES)
    np.testing.assert_array_equal(X.toarray(), counts)
    assert (X.shape, X.dtype, coverage) == ((4, len(GENES)), np.float32, 1)


def test_genes_that_were_not_measured_are_zero():
    X, _ = align_to_vocabulary(make_adata([[3, 4]], ["ESR1", "TP53"]), GENES)
    assert X.toarray().tolist() == [[4, 0, 0, 0, 0, 0, 0, 3]]


@pytest.mark.parametrize("copies", [["ERBB2", "TBCE", "TBCE"], ["ERBB2", "TBCE", "TBCE-1"]])
def test_counts_of_columns_that_name_one_gene_are_summed(copies):
    X, _ = align_to_vocabulary(make_adata([[1, 2, 5]], copies), GENES)
    assert X.toarray()[0, [3, 5]].tolist() == [7, 1]


@given(seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_logged_columns_that_name_one_gene_are_summed_as_counts(seed):
    counts = random_counts(4, 5, seed)
    names = ["TBCE", "ACTB", "TBCE", "TP53", "TBCE-1"]
    summed = np.column_stack([counts[:, [0, 2, 4]].sum(1), counts[:, 1], counts[:, 3]])
    X, _ = align_to_vocabulary(make_adata(logged(counts), names), GENES, logged=True)
    expected, _ = align_to_vocabulary(make_adata(logged(summed), ["TBCE", "ACTB", "TP53"]), GENES, logged=True)
    np.testing.assert_allclose(X.toarray(), expected.toarray(), rtol=1e-6)
    assert X.dtype == np.float32


def test_flag_t_with_copies_gives_the_tokens_of_summed_counts():
    counts, model = random_counts(4, 4), ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2)
    summed = np.column_stack([counts[:, 0] + counts[:, 2], counts[:, [1, 3]]])
    copies = model.tokens(make_adata(logged(counts), ["TBCE", "ACTB", "TBCE", "TP53"]), pre_normalized="T")
    plain = model.tokens(make_adata(logged(summed), ["TBCE", "ACTB", "TP53"]), pre_normalized="T")
    np.testing.assert_allclose(copies.values, plain.values, rtol=1e-6)


def test_counts_with_copies_are_not_taken_for_logged_values():
    model = ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"takes log-normalized values.*whole counts"):
        model.tokens(make_adata(random_counts(4, 4), ["TBCE", "ACTB", "TBCE", "TP53"]), pre_normalized="T")


def test_coverage_is_the_share_of_expressed_genes_that_are_known():
    model = ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2)
    adata = make_adata([[1, 0, 2, 3, 0], [0, 0, 0, 3, 0]], ["TP53", "ESR1", "TBCE", "UNKNOWN", "ALSO"])
    assert model.coverage(adata) == pytest.approx(2 / 3)
    assert model.coverage(adata[:, :3]) == 1


def test_half_of_the_genes_is_enough_and_less_is_refused_beside_ten_names_of_each():
    genes = [f"KNOWN{i}" for i in range(20)]
    known, unknown = genes[5:17], [f"STRANGE{i}" for i in range(13)]
    assert align_to_vocabulary(make_adata(np.ones((2, 24)), known + unknown[:12]), pd.Index(genes))[1] == 0.5
    with pytest.raises(ValueError, match=r"only 48% of the data's expressed genes.*at least half") as error:
        align_to_vocabulary(make_adata(np.ones((2, 25)), known + unknown), pd.Index(genes))
    message = str(error.value)
    assert ", ".join(unknown[:10]) + "." in message
    assert message.endswith(", ".join(genes[:10]))
    assert unknown[10] not in message


def test_genes_of_the_vocabulary_that_are_not_expressed_do_not_make_a_half():
    with pytest.raises(ValueError, match="only 33%"):
        align_to_vocabulary(make_adata([[1, 0, 0, 0, 2, 3]], [*GENES[:4], "A", "B"]), GENES)


def test_ensembl_ids_without_a_mapping_are_told_as_such():
    ids = [f"ENSG000001415{i}" for i in range(6)]
    with pytest.raises(ValueError, match=r"named by Ensembl ids.*vocabulary holds symbols.*mapping=.*fetch hgnc"):
        align_to_vocabulary(make_adata(np.ones((1, 6)), ids), GENES)


def test_ensembl_ids_that_a_mapping_does_not_know_are_told_as_such(hgnc):
    ids = [f"ENSMUSG000001415{i}" for i in range(6)]
    with pytest.raises(ValueError, match=r"named by Ensembl ids.*this mapping does not lead to them"):
        align_to_vocabulary(make_adata(np.ones((1, 6)), ids), GENES, mapping=read_gene_mapping(hgnc, GENES))


def test_a_spot_without_counts_is_told_as_such_even_when_it_is_the_only_one():
    model = ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"express no gene of the vocabulary \(spot0\)"):
        model.tokens(make_adata(np.zeros((1, len(GENES)))))


def test_the_published_list_is_read_whole(golden):
    path = golden / "scfoundation" / "gene_names.json"
    assert read_vocabulary(path).tolist() == json.loads(path.read_text())
    assert len(read_vocabulary(path)) == 19264
