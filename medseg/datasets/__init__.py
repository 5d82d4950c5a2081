"""Public data sets: from what their official sites hand out to a folder that `medseg train` reads."""
