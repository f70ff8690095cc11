"""Measurements behind what the README says; README.md beside this file is their ledger."""
