"""What every room stands on: files of unknown origin, and text of unknown origin."""
