"""MONAI Label: bundles as models of its server, for 3D Slicer, OHIF and every other client of its REST interface."""
