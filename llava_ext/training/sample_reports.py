"""Reports on samples that are left out: `bad_samples.jsonl` and `too_long_samples.jsonl` in the output folder.

The reports of a run are kept until another run begins in its folder. Data is validated before that, so the new reports
are written under pending names (`bad_samples.new.jsonl`) first.
"""

import os
from pathlib import Path

from evotok_plugin.common.files import writing
from evotok_plugin.common.owned_folder import OwnedFolder
from evotok_plugin.data.bad_samples import BadSamples
from llava_ext.training.checkpoints import PENDING_REPORTS, REPORTS, owned_folder


class StageReport(BadSamples):
    """Samples that cannot be used, with a report that is recorded as a file of the run when it is written."""

    def write(self, report: Path) -> None:
        with writing(report):
            owned_folder(report.parent).claim(report.name)
            super().write(report)


def holds_run(owned: OwnedFolder) -> bool:
    """Whether a folder holds other files of a run than reports, which a failed validation also leaves."""
    return any(path.name not in (*REPORTS, *PENDING_REPORTS) for path in owned.files())


def prepare_report(output_dir: str | Path, name: str) -> Path:
    """The path to write one of `REPORTS` to during validation; the report of an earlier validation is deleted."""
    owned, pending = owned_folder(output_dir), PENDING_REPORTS[REPORTS.index(name)]
    replaced = [pending] if holds_run(owned) else [pending, name]
    with writing(owned.path):
        for old in filter(owned.owns, replaced):
            (owned.path / old).unlink(missing_ok=True)
    return owned.path / replaced[-1]


def place_reports(output_dir: str | Path) -> None:
    """Replace the reports of the previous run by the pending ones of the validation."""
    owned = owned_folder(output_dir)
    for name, pending in zip(REPORTS, PENDING_REPORTS, strict=True):
        if (owned.path / pending).is_file() and owned.owns(pending):
            owned.claim(name)
            os.replace(owned.path / pending, owned.path / name)
        elif owned.owns(name):
            (owned.path / name).unlink(missing_ok=True)
