"""Estimates what a run will take before it is paid for: memory, time and cost, on devices that need not be present."""
