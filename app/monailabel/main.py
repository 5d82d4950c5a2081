"""The MONAI Label app: the server takes the class that it finds here; see medseg label serve."""

from medseg.label.app import MedsegLabelApp  # noqa: F401
