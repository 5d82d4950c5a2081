"""Many scans with one bundle: found, computed, recorded; a run that was killed goes on where it stopped."""
