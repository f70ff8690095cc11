"""Lightning datamodules: calibration batches and evaluation sets."""
