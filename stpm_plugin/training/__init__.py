"""Training in Lightning and anomalib: data and hold-out, feature cache, the module, thresholds."""
