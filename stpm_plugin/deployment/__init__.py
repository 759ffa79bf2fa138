"""From a trained model to verdicts: export, INT8, scoring on one machine or a Ray cluster."""
