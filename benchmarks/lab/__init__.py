"""What the studies share: cases, the yardstick, calibration sets, tables, provenance."""
