"""`evotok evolve`: the contribution of each level, in pictures and figures."""

import argparse
from pathlib import Path

from evotok_plugin.commands.options import at_size
from evotok_plugin.common.files import check_output_folder, write_whole, writing
from evotok_plugin.common.pictures import save_picture
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.sources import open_sources
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.level_plots import check_plotting, draw_strips, plot_code_usage, plot_curves, plot_fits
from evotok_plugin.evaluation.levels import Evolution, measure_evolution
from evotok_plugin.teacher import load_recorded_teacher
from evotok_plugin.tokenizer_folder import open_tokenizer


def run(arguments: argparse.Namespace) -> None:
    """Write strips of reconstructions, curves over depth as a plot and as CSV, and the code usage."""
    check_output_folder(arguments.output)
    check_plotting()
    if arguments.fit_on and not arguments.fit:
        raise UserError("--fit_on has no effect without --fit; add --fit, or leave it out")
    model, processor = open_tokenizer(arguments.model, arguments.device)
    processor = at_size(processor, model, arguments.size)
    has_semantics = model.config.semantic_decoder_trained
    teacher = (
        load_recorded_teacher(arguments.teacher, model.name_or_path).to(model.device)
        if arguments.teacher and has_semantics
        else None
    )
    source, out = open_sources(arguments.source), Path(arguments.output)
    bad = BadSamples(out / "bad_images.jsonl", arguments.max_bad_fraction)
    evolution = measure_evolution(
        model,
        processor,
        source,
        teacher,
        bad=bad,
        max_images=arguments.max_images,
        num_strips=arguments.strips,
        batch_size=arguments.batch_size,
        fit=arguments.fit,
        fit_on=open_sources(arguments.fit_on) if arguments.fit_on else None,
    )
    _print_table(evolution)
    if evolution.fits is not None:
        values = {name: getattr(evolution.fits, name) for name in ("pixel_r2", "teacher_r2", "probe_accuracy")}
        known = ", ".join(f"{_COLUMNS[name][0]} {value[-1]:.3f}" for name, value in values.items() if value is not None)
        print(f"latents before quantization: {known}")
        if evolution.fits.teacher_probe is not None:
            print(f"the teacher's features: probe {evolution.fits.teacher_probe:.3f}")
    for name, constant in (("teacher", evolution.constant_teacher), ("own", evolution.constant_own)):
        if constant is not None:
            print(f"a constant, the mean of the features, has cosine {constant:.4f} ({name})")
    if not has_semantics:
        print(
            "no semantic curve: the semantic decoder was not trained, because the tokenizer had no teacher"
            + (f"; --teacher {arguments.teacher} is not used" if arguments.teacher else "")
        )
    for name, reason in bad.reasons.items():
        print(f"left out: {name}: {reason}")
    _write(evolution, out)


_COLUMNS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "cosine_teacher": ("cos teacher", "{:.4f}"),
    "cosine_own": ("cos own", "{:.4f}"),
    "pixel_r2": ("R2 pixels", "{:.3f}"),
    "teacher_r2": ("R2 teacher", "{:.3f}"),
    "probe_accuracy": ("probe", "{:.3f}"),
    "code_usage": ("codes used", "{:.1%}"),
    "perplexity": ("perplexity", "{:.1f}"),
}


def _print_table(evolution: Evolution) -> None:
    table = evolution.columns()
    shown = {name: column for name, column in _COLUMNS.items() if name in table}
    print(evolution.images)
    print("depth", *(f"{heading:>11}" for heading, _ in shown.values()))
    for row, depth in enumerate(evolution.depths):
        print(f"{depth:5d}", *(f"{form.format(table[name][row]):>11}" for name, (_, form) in shown.items()))


def _write(evolution: Evolution, out: Path) -> None:
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    save_picture(draw_strips(evolution), out / "evolution.png")
    curves, usage = plot_curves(evolution), plot_code_usage(evolution)
    write_whole(out / "curves.png", lambda part: curves.savefig(part, format="png"), shared=True)
    write_whole(out / "code_usage.png", lambda part: usage.savefig(part, format="png"), shared=True)
    write_whole(out / "evolution.csv", evolution.write_csv, shared=True)
    written = ["evolution.png", "curves.png", "code_usage.png", "evolution.csv"]
    if evolution.fits is not None:
        fits = plot_fits(evolution)
        write_whole(out / "fits.png", lambda part: fits.savefig(part, format="png"), shared=True)
        written.append("fits.png")
    for name in written:
        print(out / name)
