"""The review app without its screen: cases, versions of masks, verdicts, jobs, exports."""
