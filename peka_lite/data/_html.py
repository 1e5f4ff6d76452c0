"""Render slides and cohorts as HTML for notebooks."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageDraw

from peka_lite._core.names import escape_html

_THUMBNAIL_PX = 220  # height


def render_slide(slide) -> str:
    """Return a slide's thumbnail with spots, one tile and a table of facts as self-contained HTML."""
    tile = Image.fromarray(slide.tiles[slide.n_spots // 2])
    pictures = "".join(
        f'<img src="data:image/png;base64,{_encode_png(picture)}" alt="{escape_html(alt)}" '
        f'style="height:{_THUMBNAIL_PX}px;margin-right:8px">'
        for picture, alt in ((_draw_thumbnail(slide), f"Slide {slide.id} with its spots"), (tile, "One tile"))
        if picture
    )
    facts = {
        "spots": slide.n_spots,
        "genes": slide.adata.n_vars,
        "counts per spot (median)": f"{np.median(np.asarray(slide.adata.X.sum(1))):,.0f}",
        "patient": slide.patient or "unknown",
        "organ": slide.metadata.get("organ") or "unknown",
        "technology": slide.metadata.get("st_technology") or "unknown",
        **{f"dropped: {reason}": n for reason, n in slide.dropped.items()},
    }
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape_html(k)}</th><td>{escape_html(v)}</td></tr>" for k, v in facts.items()
    )
    note = "<p><em>Synthetic data.</em></p>" if slide.metadata.get("synthetic") else ""
    return f"<div><strong>Slide {escape_html(slide.id)}</strong>{note}<div>{pictures}</div><table>{rows}</table></div>"


def render_cohort(cohort) -> str:
    """Return a table with one row per slide, and the slides left out, as HTML."""
    head = "".join(f"<th>{h}</th>" for h in ("slide", "patient", "organ", "spots", "genes", "dropped"))
    rows = ""
    for s in cohort.slides:
        dropped = "; ".join(f"{n} {reason}" for reason, n in s.dropped.items()) or "none"
        cells = (s.id, s.patient or "unknown", s.metadata.get("organ") or "", s.n_spots, s.adata.n_vars, dropped)
        rows += f"<tr>{''.join(f'<td>{escape_html(cell)}</td>' for cell in cells)}</tr>"
    out = "".join(f"<li>left out {escape_html(i)}: {escape_html(text)}</li>" for i, text in cohort.left_out.items())
    synthetic = any(s.metadata.get("synthetic") for s in cohort.slides)
    title = f"{len(cohort.slides)} slides, {len(cohort)} spots, {len(cohort.genes)} shared genes"
    return (
        f"<div><strong>Cohort: {title}</strong>{'<p><em>Synthetic data.</em></p>' if synthetic else ''}"
        f"<table><tr>{head}</tr>{rows}</table><ul>{out}</ul></div>"
    )


def _draw_thumbnail(slide) -> Image.Image | None:
    library = next(iter(slide.adata.uns.get("spatial", {}).values()), None)
    image = (library or {}).get("images", {}).get("downscaled_fullres")
    if image is None:
        return None
    scale = float(library["scalefactors"]["tissue_downscaled_fullres_scalef"])
    picture = Image.fromarray(np.asarray(image)).convert("RGB")
    zoom = 2 * _THUMBNAIL_PX / picture.height
    picture = picture.resize((max(1, round(picture.width * zoom)), 2 * _THUMBNAIL_PX))
    draw = ImageDraw.Draw(picture)
    radius = max(1.5, float(library["scalefactors"]["spot_diameter_fullres"]) * scale * zoom / 2)
    for x, y in np.asarray(slide.adata.obsm["spatial"])[:, :2] * scale * zoom:
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=(20, 60, 160))
    return picture


def _encode_png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
