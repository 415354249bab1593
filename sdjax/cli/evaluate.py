"""`sdjax evaluate`: how well a model draws captions whose pictures are known."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import sdjax
from sdjax.data import check_new_folder
from sdjax.evaluation import Report, evaluate
from sdjax.sheet import save_sheet, tile

ROWS = 24
"""Captions, or reconstructions, in a grid."""


def run(args: argparse.Namespace) -> None:
    """Prints the figures; with --out, writes them and the grids into a folder."""
    if args.output is not None:
        check_new_folder(args.output)
    model = sdjax.load(args.model)
    names = ("num_inference_steps", "guidance_scale", "sampler")
    given = {name: getattr(args, name) for name in names}
    report = evaluate(
        model,
        args.data,
        among=args.among or (),
        limit=args.limit,
        images_per_caption=args.images_per_caption,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=not args.no_progress,
        **{name: value for name, value in given.items() if value is not None},
    )
    summary = report.summary()
    if args.output is not None:
        _write(Path(args.output), report, summary)
    if args.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        _print(summary)


def _print(summary: dict[str, Any]) -> None:
    drawn = f"{summary['captions']} captions × {summary['images_per_caption']} pictures"
    print(f"{drawn}, among {summary['candidates']}")
    print(f"top-1 {summary['top1']:.1%}   top-5 {summary['top5']:.1%}")
    print(f"autoencoder: PSNR {summary['psnr']:.2f} dB   SSIM {summary['ssim']:.4f}")


def _write(folder: Path, report: Report, summary: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n")
    truth = report.truth[:ROWS]
    rows = np.concatenate([truth[:, None], report.drawn[:ROWS]], axis=1)
    flat = rows.reshape(-1, *rows.shape[2:])
    save_sheet(tile(flat, rows.shape[1]), folder / "drawn.png")
    pairs = np.stack([truth, report.reconstructed[:ROWS]], axis=1)
    flat = pairs.reshape(-1, *pairs.shape[2:])
    save_sheet(tile(flat, 8), folder / "reconstructed.png")
