"""scFoundation as a teacher: the published checkpoint, spots in, embeddings out."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from scipy import sparse

from peka_lite import __version__
from peka_lite._core._stream import BY, finish, open_partial
from peka_lite._core.device import PRECISION, compute_dtype, default_device
from peka_lite._core.locks import lock_work_folder
from peka_lite._core.outputs import check_file
from peka_lite._core.progress import progress_bar
from peka_lite.data.expression import hash_counts, load_in_memory
from peka_lite.teachers._checkpoint import find_genes, read_encoder
from peka_lite.teachers._encoder import POOLS, Encoder, EncoderConfig, pool_tokens
from peka_lite.teachers._tokens import Tokens, check_options, check_values, tokenize
from peka_lite.teachers._vocabulary import align_to_vocabulary, read_gene_mapping, read_vocabulary

MAX_TOKENS = {"cpu": 4_096, "cuda": 65_536}


class ScFoundation:
    """A pretrained encoder of expression; make one with `from_checkpoint` (or `random`, to test and teach).

    Attributes
    ----------
    genes
        The vocabulary: symbols in the order the model was trained with.
    origin
        Where the weights come from, in words.
    fingerprint
        Hash of weights, sizes, vocabulary and gene mapping; 16 hex digits.
    precision
        Compute type by device, as `peka_lite._core.device.PRECISION`: float32 on a CPU, half precision on a GPU.

    Examples
    --------
    >>> import anndata as ad
    >>> import numpy as np
    >>> import pandas as pd
    >>> import peka_lite as pk
    >>> genes = pd.DataFrame(index=["CD3E", "ACTB", "NEW1"])
    >>> spots = ad.AnnData(np.array([[0.0, 5.0, 2.0], [1.0, 9.0, 0.0]]), var=genes)
    >>> teacher = pk.teachers.ScFoundation.random(["ACTB", "CD3E", "KRT8"])
    >>> teacher
    ScFoundation(random weights, seed 0: 2 layers, width 64, 3 genes)
    >>> round(teacher.coverage(spots), 2), teacher.embed(spots).shape, teacher.embed(spots, pool="max").shape
    (0.67, (2, 256), (2, 64))
    """

    def __init__(
        self,
        encoder: Encoder,
        genes: str | os.PathLike | Sequence[str],
        *,
        mapping: str | os.PathLike | Mapping[str, str] | None = None,
        origin: str,
        precision: Mapping[str, torch.dtype] = PRECISION,
    ):
        self.genes = read_vocabulary(genes)
        if len(self.genes) != encoder.config.n_genes:
            raise ValueError(f"the model knows {encoder.config.n_genes} genes, the gene list {len(self.genes)}")
        if isinstance(mapping, str | os.PathLike):
            mapping = read_gene_mapping(mapping, self.genes)
        self.mapping, self.origin, self.precision = dict(mapping or {}), origin, dict(precision)
        self.encoder = encoder.eval().requires_grad_(False)
        parts = (encoder.config, list(self.genes), sorted(self.mapping.items()))
        digest = hashlib.sha256(repr(parts).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy())
        self.fingerprint = digest.hexdigest()[:16]
        self._running: tuple = ()

    def __repr__(self) -> str:
        c = self.encoder.config
        return f"ScFoundation({self.origin}: {c.depth} layers, width {c.hidden_dim}, {c.n_genes} genes)"

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        key: str = "cell",
        genes: str | os.PathLike | Sequence[str] | None = None,
        mapping: str | os.PathLike | Mapping[str, str] | None = None,
        precision: Mapping[str, torch.dtype] = PRECISION,
    ) -> ScFoundation:
        """Load the published ``models.ckpt``; every size comes from its config.

        Parameters
        ----------
        path
            File with entries ``cell``, ``gene`` and ``rde``, each a config and a state dict. It is read with
            ``weights_only=True``: a file that would run code is refused.
        key
            ``"cell"``, or ``"rde"`` for read-depth enhancement.
        genes
            The vocabulary, as in `read_vocabulary`; None takes ``OS_scRNA_gene_index.19264.tsv`` or
            ``gene_names.json`` beside the checkpoint, else the list that ``peka-lite fetch`` put in the cache.
        mapping
            How other gene names lead to the vocabulary: HGNC's complete set as TSV (`read_gene_mapping`) or a dict.
        precision
            Compute type by device.

        Raises
        ------
        FileNotFoundError, ValueError
            For a file that is not there, not readable, would run code, or does not hold such a model.
        """
        path = Path(path)
        encoder = read_encoder(path, key=key)
        return cls(
            encoder, find_genes(path) if genes is None else genes,
            mapping=mapping, origin=f"{path.name}, {key}", precision=precision,
        )  # fmt: skip

    @classmethod
    def random(
        cls,
        genes: str | os.PathLike | Sequence[str],
        *,
        hidden_dim: int = 64,
        depth: int = 2,
        heads: int = 2,
        seed: int = 0,
        precision: Mapping[str, torch.dtype] = PRECISION,
    ) -> ScFoundation:
        """Make the same architecture with random weights, to test and to teach; it has learnt nothing."""
        vocabulary = read_vocabulary(genes)
        config = EncoderConfig(hidden_dim, depth, heads, len(vocabulary) + 2, 100, 1.0, 102, 103)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            encoder = Encoder(config)
        return cls(encoder, vocabulary, origin=f"random weights, seed {seed}", precision=precision)

    fitted_on_ = None  # trained elsewhere

    def fit(self, adata=None) -> ScFoundation:
        """Do nothing: the model is pretrained."""
        return self

    def coverage(self, adata: ad.AnnData) -> float:
        """Return the share of the data's expressed genes that the vocabulary knows; below a half is an error."""
        return align_to_vocabulary(adata, self.genes, mapping=self.mapping)[1]

    def align(self, adata: ad.AnnData) -> sparse.csr_matrix:
        """Return counts in the vocabulary's order, (N, n_genes) float32; columns that name one gene are summed."""
        return align_to_vocabulary(adata, self.genes, mapping=self.mapping)[0]

    def tokens(
        self, adata: ad.AnnData, *, resolution: str = "t4", pre_normalized: str = "F", input_type: str = "singlecell"
    ) -> Tokens:
        """Align genes to the vocabulary by name and turn spots into tokens; as `tokenize`, whose errors it raises.

        Columns that name one gene are summed (log-normalized values as the counts they stand for). Totals are taken
        over genes of the vocabulary. For `pre_normalized` A the raw totals are ``obs["total_counts"]``, or the last
        column where there is no such entry.

        Raises
        ------
        ValueError
            Where fewer than half of the expressed genes are in the vocabulary, and for Ensembl ids without a mapping.
        """
        options = {"resolution": resolution, "pre_normalized": pre_normalized, "input_type": input_type}
        check_options(**options)
        adata, total = load_in_memory(adata), None
        if pre_normalized == "A":
            adata, total = _raw_totals(adata, self.genes)
        check_values(sparse.csr_matrix(adata.X).data, pre_normalized=pre_normalized, input_type=input_type)
        X, _ = align_to_vocabulary(adata, self.genes, mapping=self.mapping, logged=pre_normalized != "F")
        return tokenize(X, total=total, names=adata.obs_names, **options)

    def embed(
        self,
        adata: ad.AnnData,
        *,
        pool: str = "all",
        resolution: str = "t4",
        pre_normalized: str = "F",
        input_type: str = "singlecell",
        batch_size: int | None = None,
        device: str | None = None,
        max_tokens: int | None = None,
        out: str | os.PathLike | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Embed spots; row i is spot i, and the batch a spot is in makes no difference.

        Parameters
        ----------
        adata
            Expression (N, G) with gene symbols as var_names, in any order and number.
        pool
            ``"all"``: S, T, maximum and mean over genes, (N, 4d); ``"max"``: maximum over all tokens, (N, d).
        resolution, pre_normalized, input_type
            As in `tokenize`.
        batch_size
            Most spots in a batch; None: as many as the tokens allow.
        device
            None: the GPU where there is one.
        max_tokens
            Most tokens in a batch, padding included; this bounds the memory. None: 4,096 on a CPU, 65,536 on a GPU.
            Where memory runs out the number is halved and the work goes on. A longer spot has a batch of its own.
        out
            ``.npy`` file to stream rows to. A stopped job with the same data, weights and settings goes on from its
            ``{out}.{machine}.partial``, on the same machine. A file that is there already is replaced when the new one
            is complete, where this wrote it.
        progress
            Say how many of the genes are known, and show a bar with spots per second and the time left.

        Returns
        -------
        numpy.ndarray
            (N, 4d) or (N, d) float32; a read-only memory map of `out` where that was given.

        Raises
        ------
        ValueError
            As `tokens`.
        MemoryError
            Where not even one spot fits.
        """
        if pool not in POOLS:
            raise ValueError(f"unknown pool {pool!r}; known: {', '.join(POOLS)}")
        for name, most in {"batch_size": batch_size, "max_tokens": max_tokens}.items():
            if most is not None and most < 1:
                raise ValueError(f"{name} must be at least 1, not {most}")
        device = torch.device(device or default_device())
        options = {"resolution": resolution, "pre_normalized": pre_normalized, "input_type": input_type}
        tokens = self.tokens(adata, **options)
        if progress:
            print(f"{self.coverage(adata):.0%} of the expressed genes are in the vocabulary", file=sys.stderr)
        shape = (adata.n_obs, self.encoder.config.hidden_dim * (4 if pool == "all" else 1))
        run = (tokens, pool, device, batch_size, max_tokens or MAX_TOKENS["cpu" if device.type == "cpu" else "cuda"])
        if out is None:
            rows = np.empty(shape, dtype=np.float32)
            self._fill(rows, np.zeros(len(rows), dtype=bool), *run, progress)
            return rows
        key = self.cache_key(adata, device=device, pool=pool, **options)
        check_file(Path(out), BY)
        with lock_work_folder(Path(out)) as work:
            rows, done = open_partial(work, shape=shape, key=key)
            self._fill(rows, done, *run, progress)
            finish(Path(out), rows)
        return np.load(out, mmap_mode="r")

    def cache_key(self, adata: ad.AnnData, *, device: str | torch.device | None = None, **options) -> str:
        """Hash what decides an embedding: counts, weights, gene names, `embed`'s options and the compute type."""
        dtype = compute_dtype(device or default_device(), precision=self.precision)
        settings = {"pool": "all", "resolution": "t4", "pre_normalized": "F", "input_type": "singlecell"} | options
        given = settings["pre_normalized"] == "A" and "total_counts" in adata.obs
        own = adata.obs["total_counts"].tolist() if given else None
        parts = (__version__, hash_counts(adata), own, self.fingerprint, dtype, sorted(settings.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def _fill(self, rows, done, tokens: Tokens, how: str, device, batch_size, max_tokens: int, progress: bool) -> None:
        dtype = compute_dtype(device, precision=self.precision)
        # Longest first: memory runs out at once or never, and the bar's time left errs on the long side.
        left = np.flatnonzero(~done)
        left = left[np.argsort(-tokens.lengths[left], kind="stable")]
        with progress_bar(
            total=len(done), initial=int(done.sum()), desc="embed spots", unit=" spots", enabled=progress,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
        ) as shown:  # fmt: skip
            while len(left):
                longest = int(tokens.lengths[left[0]])
                batch = left[: max(1, min(max_tokens // longest, batch_size or len(left)))]
                try:
                    encoder = self._on(device, dtype)
                    values, positions, lengths = (torch.from_numpy(a).to(device) for a in tokens.padded(batch))
                    found = pool_tokens(encoder(values, positions, lengths), lengths, how=how).cpu().numpy()
                except RuntimeError as error:
                    if not _out_of_memory(error):
                        raise
                    if len(batch) == 1:
                        raise MemoryError(
                            f"a spot of {longest} tokens does not fit on {device}; use another"
                        ) from error
                    found = None
                if found is None:  # only here does Python let go of what the failed pass held
                    max_tokens = longest * (len(batch) // 2)
                    torch.cuda.empty_cache()
                    continue
                if not np.isfinite(found).all():
                    if dtype == torch.float32:
                        raise FloatingPointError(f"embeddings on {device} are not finite: are the weights whole?")
                    warnings.warn(f"{dtype} overflows on {device}: going on in float32, slower", stacklevel=3)
                    dtype = torch.float32
                    continue
                rows[batch], done[batch] = found, True
                left = left[len(batch) :]
                shown.update(len(batch))
        self._running = ()  # the device's memory is for the student now

    def _on(self, device: torch.device, dtype: torch.dtype) -> Encoder:
        if device.type == "cpu" and dtype == torch.float32:
            return self.encoder
        if self._running[:2] != (device, dtype):
            self._running = (device, dtype, copy.deepcopy(self.encoder).to(device).halve(dtype))
        return self._running[2]


def _raw_totals(adata: ad.AnnData, genes) -> tuple[ad.AnnData, np.ndarray]:
    if "total_counts" in adata.obs:
        total = adata.obs["total_counts"].to_numpy()
        if not np.issubdtype(total.dtype, np.number) or np.any(total != np.rint(total)):
            raise ValueError("obs['total_counts'] holds no raw totals: they are whole numbers")
        return adata, total
    if not adata.n_vars or adata.var_names[-1] in genes:
        raise ValueError("pre_normalized='A' needs raw totals: obs['total_counts'], or a last column that holds them")
    return adata[:, :-1], sparse.csr_matrix(adata.X)[:, -1].toarray().ravel()


def _out_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")  # the last: cuBLAS on a full card
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
