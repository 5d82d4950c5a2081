"""Training: from a folder of labelled cases to a run that can be packed into a bundle."""
