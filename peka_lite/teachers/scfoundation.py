"""Embed spots with scFoundation, loaded from a checkpoint."""

from __future__ import annotations

import copy
import hashlib
import os
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
from peka_lite._core.progress import logger, progress_bar
from peka_lite.data.expression import hash_counts, load_in_memory
from peka_lite.teachers._checkpoint import find_genes, read_encoder
from peka_lite.teachers._encoder import POOLS, Encoder, EncoderConfig, pool_tokens
from peka_lite.teachers._tokens import Tokens, check_options, check_values, tokenize
from peka_lite.teachers._vocabulary import align_to_vocabulary, read_gene_mapping, read_vocabulary

MAX_TOKENS = {"cpu": 4_096, "cuda": 65_536}


class ScFoundation:
    """Pretrained encoder of expression. Create one with `from_checkpoint`, or with `random` for tests and tutorials.

    Attributes
    ----------
    genes
        The vocabulary: symbols in the order of the model.
    origin
        Source of the weights, as text.
    fingerprint
        Hash of weights, sizes, vocabulary and gene mapping; 16 hex digits.
    precision
        Compute type per device, as in `peka_lite._core.device.PRECISION`: float32 on a CPU, half precision on a GPU.

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
            raise ValueError(f"the model has {encoder.config.n_genes} genes, but the gene list has {len(self.genes)}")
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
        self._device_copy: tuple = ()

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
        """Load the published ``models.ckpt``. All sizes come from its config.

        Parameters
        ----------
        path
            File with entries ``cell``, ``gene`` and ``rde``, each a config and a state dict. Files that would run code
            are rejected.
        key
            ``"cell"``, or ``"rde"`` for read-depth enhancement.
        genes
            The vocabulary, as in `read_vocabulary`. None: ``OS_scRNA_gene_index.19264.tsv`` or ``gene_names.json`` in
            the checkpoint's folder, or else the list downloaded by ``peka-lite fetch``.
        mapping
            Mapping from other gene names to the vocabulary: HGNC's complete set as TSV (`read_gene_mapping`) or a dict.
        precision
            Compute type per device.

        Raises
        ------
        FileNotFoundError, ValueError
            For a file that is missing, unreadable, would run code, or contains no such model.
        """
        path = Path(path)
        encoder, genes = read_encoder(path, key=key), find_genes(path) if genes is None else genes
        return cls(encoder, genes, mapping=mapping, origin=f"{path.name}, {key}", precision=precision)

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
        """Create the same architecture with random weights, for tests and tutorials."""
        vocabulary = read_vocabulary(genes)
        config = EncoderConfig(hidden_dim, depth, heads, len(vocabulary) + 2, 100, 1.0, 102, 103)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            encoder = Encoder(config)
        return cls(encoder, vocabulary, origin=f"random weights, seed {seed}", precision=precision)

    fitted_on_ = None  # pretrained: no spots of the cohort were used

    def fit(self, adata=None) -> ScFoundation:
        """Do nothing: the model is pretrained."""
        return self

    def coverage(self, adata: ad.AnnData) -> float:
        """Return the share of expressed genes that are in the vocabulary. Less than half raises ValueError."""
        return align_to_vocabulary(adata, self.genes, mapping=self.mapping)[1]

    def align(self, adata: ad.AnnData) -> sparse.csr_matrix:
        """Return counts in the vocabulary's order, (N, n_genes) float32. Columns of the same gene are summed."""
        return align_to_vocabulary(adata, self.genes, mapping=self.mapping)[0]

    def tokens(
        self, adata: ad.AnnData, *, resolution: str = "t4", pre_normalized: str = "F", input_type: str = "singlecell"
    ) -> Tokens:
        """Align genes to the vocabulary by name and convert spots to tokens, as `tokenize`.

        Columns of the same gene are summed (log-normalized values as counts). Totals are computed over genes of the
        vocabulary, which must have at least half of the expressed genes. For `pre_normalized` A, raw totals are
        ``obs["total_counts"]``, or the last column if there is no such entry.
        """
        options = {"resolution": resolution, "pre_normalized": pre_normalized, "input_type": input_type}
        check_options(**options)
        adata, total = load_in_memory(adata), None
        if pre_normalized == "A":
            adata, total = _read_raw_totals(adata, self.genes)
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
        """Embed spots. Row i is spot i, and results do not depend on the batches.

        Parameters
        ----------
        adata
            Expression (N, G) with gene symbols as var_names, in any order.
        pool
            ``"all"``: S, T, maximum and mean over genes, (N, 4d); ``"max"``: maximum over all tokens, (N, d).
        resolution, pre_normalized, input_type
            As in `tokenize`.
        batch_size
            Maximum number of spots in a batch. None: limited by `max_tokens` only.
        device
            None: the GPU if there is one.
        max_tokens
            Maximum number of tokens in a batch, including padding, to limit memory. None: 4,096 on a CPU, 65,536 on a
            GPU. It is halved if memory runs out. A longer spot is a batch by itself.
        out
            ``.npy`` file to write rows to. A stopped job with the same data, weights and settings resumes from
            ``{out}.{machine}.partial``, on the same machine. An existing file written by this method is replaced when
            the new one is complete.
        progress
            Log the share of genes in the vocabulary, and show a bar with spots per second and the time remaining.

        Returns
        -------
        numpy.ndarray
            (N, 4d) or (N, d) float32; a read-only memory map of `out` if given.

        Raises
        ------
        ValueError
            As `tokens`.
        MemoryError
            If a single spot does not fit.
        """
        if pool not in POOLS:
            raise ValueError(f"unknown pool {pool!r}; known: {', '.join(POOLS)}")
        for name, limit in {"batch_size": batch_size, "max_tokens": max_tokens}.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, not {limit}")
        device = torch.device(device or default_device())
        options = {"resolution": resolution, "pre_normalized": pre_normalized, "input_type": input_type}
        tokens = self.tokens(adata, **options)
        if progress:
            logger.info(f"{self.coverage(adata):.0%} of the expressed genes are in the vocabulary")
        shape = (adata.n_obs, self.encoder.config.hidden_dim * (4 if pool == "all" else 1))
        max_tokens = max_tokens or MAX_TOKENS["cpu" if device.type == "cpu" else "cuda"]
        run = (tokens, pool, device, batch_size, max_tokens, progress)
        if out is None:
            rows = np.empty(shape, dtype=np.float32)
            self._fill(rows, np.zeros(len(rows), dtype=bool), *run)
            return rows
        key = self.cache_key(adata, device=device, pool=pool, **options)
        check_file(Path(out), BY)
        with lock_work_folder(Path(out)) as work:
            rows, done = open_partial(work, shape=shape, key=key)
            self._fill(rows, done, *run)
            finish(Path(out), rows)
        return np.load(out, mmap_mode="r")

    def cache_key(self, adata: ad.AnnData, *, device: str | torch.device | None = None, **options) -> str:
        """Return a hash of all that determines an embedding: data, weights, gene names, options and compute type."""
        dtype = compute_dtype(device or default_device(), precision=self.precision)
        settings = {"pool": "all", "resolution": "t4", "pre_normalized": "F", "input_type": "singlecell"} | options
        has_totals = settings["pre_normalized"] == "A" and "total_counts" in adata.obs
        totals = adata.obs["total_counts"].tolist() if has_totals else None
        parts = (__version__, hash_counts(adata), totals, self.fingerprint, dtype, sorted(settings.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @torch.inference_mode()
    def _fill(self, rows, done, tokens: Tokens, how: str, device, batch_size, max_tokens: int, progress: bool) -> None:
        dtype = compute_dtype(device, precision=self.precision)
        # Longest first: memory runs out at the start if at all, and the time remaining is not underestimated.
        remaining = np.flatnonzero(~done)
        remaining = remaining[np.argsort(-tokens.lengths[remaining], kind="stable")]
        with progress_bar(
            total=len(done), initial=int(done.sum()), desc="embed spots", unit=" spots", enabled=progress,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
        ) as bar:  # fmt: skip
            while len(remaining):
                longest = int(tokens.lengths[remaining[0]])
                batch = remaining[: max(1, min(max_tokens // longest, batch_size or len(remaining)))]
                try:
                    encoder = self._encoder_on(device, dtype)
                    values, positions, lengths = (torch.from_numpy(a).to(device) for a in tokens.padded(batch))
                    E = pool_tokens(encoder(values, positions, lengths), lengths, how=how).cpu().numpy()
                except RuntimeError as error:
                    if not _is_out_of_memory(error):
                        raise
                    if len(batch) == 1:
                        problem = f"a spot of {longest} tokens does not fit on {device}"
                        raise MemoryError(f"{problem}; use a larger device") from error
                    E = None
                if E is None:  # after the except block, which keeps the failed pass's tensors
                    max_tokens = longest * (len(batch) // 2)
                    torch.cuda.empty_cache()
                    continue
                if not np.isfinite(E).all():
                    if dtype == torch.float32:
                        raise FloatingPointError(f"embeddings on {device} are not finite; check the weights file")
                    warnings.warn(f"{dtype} overflows on {device}: continuing in float32, slower", stacklevel=3)
                    dtype = torch.float32
                    continue
                rows[batch], done[batch] = E, True
                remaining = remaining[len(batch) :]
                bar.update(len(batch))
        self._device_copy = ()  # frees the device's memory for the student

    def _encoder_on(self, device: torch.device, dtype: torch.dtype) -> Encoder:
        if device.type == "cpu" and dtype == torch.float32:
            return self.encoder
        if self._device_copy[:2] != (device, dtype):
            self._device_copy = (device, dtype, copy.deepcopy(self.encoder).to(device).halve(dtype))
        return self._device_copy[2]


def _read_raw_totals(adata: ad.AnnData, genes) -> tuple[ad.AnnData, np.ndarray]:
    if "total_counts" in adata.obs:
        total = adata.obs["total_counts"].to_numpy()
        if not np.issubdtype(total.dtype, np.number) or np.any(total != np.rint(total)):
            raise ValueError("obs['total_counts'] must contain raw totals, which are whole numbers")
        return adata, total
    if not adata.n_vars or adata.var_names[-1] in genes:
        raise ValueError("pre_normalized='A' needs raw totals in obs['total_counts'] or in the last column")
    return adata[:, :-1], sparse.csr_matrix(adata.X)[:, -1].toarray().ravel()


def _is_out_of_memory(error: Exception) -> bool:
    messages = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")  # the last is cuBLAS's
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)
