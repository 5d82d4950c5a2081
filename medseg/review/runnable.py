"""What the run form has to ask for a bundle and a case, known from configurations and headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.bundles.diagnosis import patient_classes
from medseg.bundles.locate import find_bundle
from medseg.bundles.spec import config_files, read_json, read_spec
from medseg.errors import BundleError
from medseg.inference.phases import channel_in_name, channel_of, reference_of
from medseg.inference.record import disclaimer_of
from medseg.io.files import split_suffix
from medseg.review.store.models import Case
from medseg.review.store.repo import Store


@dataclass(frozen=True)
class Runnable:
    """A bundle as the form asks for it.

    Attributes:
        name: of the bundle.
        phases: of a bundle that diagnoses, its channels; () for one that segments only.
        disclaimer: what every result of it says of itself.
    """

    name: str
    phases: tuple[str, ...] = ()
    disclaimer: str = ""

    @classmethod
    def of(cls, name: str) -> Runnable:
        """Look a bundle up; one that cannot be read has no phases, and its run says what is wrong."""
        try:
            root = find_bundle(name)
            spec, metadata = read_spec(root), read_json(config_files(root)[0])
        except BundleError:
            return cls(name)
        phases = tuple(spec.channels) if patient_classes(spec, metadata) else ()
        return cls(name, phases, disclaimer_of(metadata))

    def phase_of(self, case: Case) -> str:
        """The phase that a case's name tells; without one the venous phase, as on the command line."""
        found = channel_in_name(case.name, self.phases)
        if found is None:
            venous = channel_of("v", self.phases)
            found = len(self.phases) - 1 if venous is None else venous
        return self.phases[found]

    def reference(self, chosen: list[str]) -> str:
        """The one of some phases on whose grid the result lies."""
        return self.phases[reference_of([self.phases.index(phase) for phase in chosen], self.phases)]


def holds_phases(store: Store, case: Case, count: int) -> bool:
    """Whether a case's own file, or files, hold this many volumes, as far as headers tell."""
    if len(case.sources) > 1:
        return True
    source = store.file(case.sources[0])
    return source != store.file(case.image_path) and _volumes(source) == count


def _volumes(file: Path) -> int:
    """Volumes along the fourth axis of a NIfTI file; 1 of anything else."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    nib: Any = nibabel
    if split_suffix(file)[1].lower() not in {".nii", ".nii.gz"}:
        return 1
    try:
        shape = nib.load(file).shape
    except (OSError, ImageFileError):
        return 1
    return int(shape[3]) if len(shape) == 4 else 1
